"""Checkpoints of MiniGPT-v2: what is trained over LLaMA-2-chat and EVA-ViT-g.

Source: Vision-CAIR/MiniGPT-4, `models/minigpt_v2.py` (5bec4d0), `models/minigpt_base.py` (045a1d0)
and `configs/models/minigpt_v2.yaml` (48d1cc6). No published file was at hand.

`checkpoint.pth` holds, under `model`, only what trained: the connector `llama_proj`, a LoRA of the
LLM with the names of `peft`, and the encoder or its norm `ln_vision` where these trained too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.models.vision import EVA, VisionConfig
from moresjax.tuning.merge import merged
from moresjax.weights.families.base import LLMFamily
from moresjax.weights.families.eva import NORM
from moresjax.weights.files import separated, stored_in
from moresjax.weights.hf import vision_mappings
from moresjax.weights.peft import attach_peft
from moresjax.weights.tensor_mapping import (
    ParameterReader,
    Tensor,
    TensorMapping,
    check_tensors,
    module_mappings,
)

CONNECTOR, IMAGE_SIZE, TEMPLATE = "concat4-linear", 448, "minigpt_v2"
# Alpha of the published LoRA, of rank 64, where the file does not say another.
ALPHA = 16.0
LLM, ENCODER = "llama_model.", "visual_encoder."


def read_minigpt(
    mllm: MLLM, file: str | Path, *, keep_lora: bool = False, allow_pickle: bool = False
) -> MLLM:
    """The model with what a checkpoint of MiniGPT-v2 holds.

    Args:
      mllm: LLaMA, EVA-ViT and a `concat4-linear` between them; it is changed.
      file: `checkpoint.pth`, or the tensors of its `model` as safetensors.
      keep_lora: Whether its LoRA stays an attached tuning; else it is merged into the LLM.
      allow_pickle: Whether torch may read a `*.pth` (weights only).

    Raises:
      UserError: The file cannot be read, holds something else, or does not fit the model; then the
        model is not to be used.
    """
    file = Path(file)
    stored, notes = stored_in(file, inside="model", allow_pickle=allow_pickle)
    tensors = {name: x for name, x in stored.items() if not name.endswith(LLMFamily.unused)}
    tuned = {name: x for name, x in tensors.items() if name.startswith(LLM)}
    rest = separated({name: x for name, x in tensors.items() if name not in tuned})
    assert mllm.connector is not None
    linear = module_mappings(mllm.connector, {"layers.0": "llama_proj"})
    mappings = [mapping.within("connector") for mapping in linear]
    mappings += _trained_of_encoder(mllm, rest)
    check_tensors(mappings, rest, (), f"{file}, as MiniGPT-v2's,")
    set_params(mllm, ParameterReader(mappings, rest), str(file))
    if not tuned:
        return mllm
    _attach_lora(mllm, tuned, _alpha(notes), file)
    return mllm if keep_lora else merged(mllm)


def _trained_of_encoder(mllm: MLLM, tensors: Mapping[str, Tensor]) -> list[TensorMapping]:
    """Where the encoder's parameters are that a checkpoint holds: all, its norm's, or none."""
    vision = mllm.config.vision
    assert isinstance(vision, VisionConfig)
    held = tuple(x for x in (ENCODER, NORM) if any(name.startswith(x) for name in tensors))
    found = (
        mapping.within("vision", "", "" if mapping.names[0].startswith(NORM) else ENCODER)
        for mapping in vision_mappings(vision, {"model_type": EVA})
    )
    return [mapping for mapping in found if mapping.names[0].startswith(held)]


def _attach_lora(mllm: MLLM, tensors: Mapping[str, Tensor], alpha: float, file: Path) -> None:
    stored = {}
    for name, tensor in tensors.items():
        # Releases of peft since 0.3 name the adapter.
        stored[re.sub(r"(lora_[AB])\.default\.", r"\1.", name.removeprefix(LLM))] = tensor[:]
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in stored if ".lora_" in name}
    ranks = {x.shape[0] for name, x in stored.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{file} holds no LoRA of one rank, but of {sorted(ranks) or 'none'}")
    config: dict[str, Any] = {"peft_type": "LORA", "r": ranks.pop(), "lora_alpha": alpha}
    inside = "|".join(sorted(modules))
    config["target_modules"] = rf".*layers\.\d+\.(self_attn|mlp)\.({inside})"
    attach_peft(mllm, config, stored, f"{file}, as a LoRA,")


def _alpha(notes: Mapping[str, Any]) -> float:
    """Alpha of the run that wrote the file, or of the published one."""
    config = notes.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    return float((model or {}).get("lora_alpha", ALPHA))
