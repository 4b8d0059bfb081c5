"""Hugging Face checkpoints to moresjax states, by the tables of `tables.py`.

Source of the layouts: transformers 5 (`LlamaForCausalLM`, `PhiForCausalLM`, `CLIPVisionModel`,
`SiglipVisionModel`, `LlavaForConditionalGeneration`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from moresjax.errors import UserError, choice_error
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import fill
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.paths import path_name
from moresjax.weights import tables

LLM_TABLES = {"llama": tables.LLAMA, "phi": tables.PHI}
VISION_TABLES = {"clip_vision_model": tables.CLIP, "siglip_vision_model": tables.SIGLIP}
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

Path_ = tuple[str, ...]


def decoder_config(hf: Mapping) -> DecoderConfig:
    """Our configuration of a Hugging Face LLM `config.json`.

    Raises:
      UserError: for a family that is not supported.
    """
    family = hf["model_type"]
    if family not in LLM_TABLES:
        raise choice_error("LLM family", family, LLM_TABLES)
    common = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "activation": _ACTIVATIONS[hf["hidden_act"]],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "max_positions": hf["max_position_embeddings"],
    }
    rope = hf.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta", 10_000.0)
    if rope.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
        raise UserError(f"rope scaling {rope or hf['rope_scaling']} is not supported")
    if family == "phi":
        return DecoderConfig(
            **common,
            rope_theta=theta,
            rotary_fraction=rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5)),
            norm="layer",
            norm_eps=hf["layer_norm_eps"],
            gated_mlp=False,
            parallel=True,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            head_bias=True,
        )
    return DecoderConfig(
        **common,
        rope_theta=theta,
        head_dim=hf.get("head_dim") or 0,
        norm_eps=hf["rms_norm_eps"],
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
    )


def vision_config(hf: Mapping, **changes) -> VisionConfig:
    """Our configuration of a CLIP or SigLIP vision `config.json`.

    Raises:
      UserError: for a family that is not supported.
    """
    family = hf["model_type"]
    if family not in VISION_TABLES:
        raise choice_error("vision encoder family", family, VISION_TABLES)
    clip = family == "clip_vision_model"
    return VisionConfig(
        image_size=hf["image_size"],
        patch_size=hf["patch_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        norm_eps=hf["layer_norm_eps"],
        activation=_ACTIVATIONS[hf["hidden_act"]],
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
        **changes,
    )


def llava_config(hf: Mapping) -> MLLMConfig:
    """Our configuration of a `LlavaForConditionalGeneration` `config.json`."""
    keeps_all = hf["vision_feature_select_strategy"] == "full"
    return MLLMConfig(
        # The wrapper's vocabulary head never has a bias, not even over Phi.
        llm=dataclasses.replace(decoder_config(hf["text_config"]), head_bias=False),
        vision=vision_config(
            hf["vision_config"],
            feature_layer=hf["vision_feature_layer"],
            select="cls_patch" if keeps_all else "patch",
            # "default" drops the first token whether or not it is a class token.
            drop_first_token=not keeps_all
            and hf["vision_config"]["model_type"] != "clip_vision_model",
        ),
        connector="mlp2x_gelu",
    )


def _component_tables(hf: Mapping) -> dict[str, tuple[dict, str]]:
    """Table and name prefix of every component of a checkpoint with this configuration."""
    if hf["model_type"] == "llava":
        vision = VISION_TABLES[hf["vision_config"]["model_type"]]
        return {
            "llm": (LLM_TABLES[hf["text_config"]["model_type"]], ""),
            "vision": (vision, "model.vision_tower."),
            "connector": (tables.LLAVA_CONNECTOR, "model."),
        }
    return {"llm": (LLM_TABLES[hf["model_type"]], "")}


def _hf_leaf(path: Path_, table: Mapping[str, str]) -> tuple[str, str]:
    """Name pattern and leaf kind of one of our parameters."""
    for end in (len(path), len(path) - 1):
        if name := table.get(".".join(path[:end])):
            leaf = path[-1]
            if end == len(path):
                return name, "copy"
            return f"{name}.{'bias' if leaf == 'bias' else 'weight'}", leaf
    raise KeyError(".".join(path))


def _to_ours(tensor: np.ndarray, kind: str) -> np.ndarray:
    if kind != "kernel":
        return tensor
    if tensor.ndim == 4:  # convolution [D, 3, patch, patch] -> [patch * patch * 3, D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def parameter_sources(config: MLLMConfig, hf: Mapping) -> Iterator[tuple[Path_, list[str], str]]:
    """(path in our model, Hugging Face names in layer order, leaf kind) of every base parameter."""
    llava = hf["model_type"] == "llava"
    by_component = _component_tables(hf)
    for path, _ in nnx.to_flat_state(nnx.state(MLLM(config), nnx.Param)):
        path = tuple(str(p) for p in path)
        table, prefix = by_component[path[0]]
        inner, first = path[1:], 0
        if inner[0] == "tail":  # blocks above the feature layer continue the numbering
            inner, first = ("blocks", *inner[1:]), config.vision.used_layers
        name, kind = _hf_leaf(inner, table)
        name = prefix + name
        if llava and path[0] == "llm":
            name = name.replace("model.", "model.language_model.", 1)
        names = [name]
        if "{}" in name:
            count = config.llm.num_layers
            if path[0] == "vision":
                used = config.vision.used_layers
                count = config.vision.num_layers - used if first else used
            names = [name.format(first + i) for i in range(count)]
        yield path, names, kind


def import_state(
    config: MLLMConfig, hf: Mapping, get: Callable[[str], np.ndarray], available: Iterable[str]
) -> dict[Path_, jax.Array]:
    """Base parameters by path, read tensor by tensor with `get`.

    Raises:
      UserError: when tensors are missing; the message lists them.
    """
    sources = list(parameter_sources(config, hf))
    available = set(available)
    missing = [n for _, names, _ in sources for n in names if n not in available]
    if missing:
        raise UserError(f"checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")
    state = {}
    for path, names, kind in sources:
        parts = [_to_ours(np.asarray(get(name)), kind) for name in names]
        stacked = "blocks" in path or "tail" in path
        state[path] = jnp.asarray(np.stack(parts) if stacked else parts[0])
    return state


def build_model(config: MLLMConfig, state: Mapping[Path_, jax.Array], tuning: str = "none") -> MLLM:
    """A model with the given base parameters and freshly initialised tuning parameters."""
    model = MLLM(config, tuning)
    fill(model, {path_name(path): x for path, x in state.items()}, "checkpoint")
    model.tuning.initialize()
    return model


def _read_config(folder: Path) -> dict:
    """The whole configuration of a folder; what its file leaves out has its family's defaults."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # transformers raises many kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/config.json cannot be used: {reason}") from None


def _state_dict_name(name: str) -> str:
    """Name in the model's state dict of a tensor in a file, which may have an older layout."""
    for old, new in tables.FILE_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def pretrained_config(folder: str | Path) -> MLLMConfig:
    """Architecture of a folder with a `config.json`.

    Raises:
      UserError: when there is none or the architecture is not supported.
    """
    hf = _read_config(Path(folder))
    return llava_config(hf) if hf["model_type"] == "llava" else MLLMConfig(llm=decoder_config(hf))


def load_pretrained(folder: str | Path, tuning: str = "none") -> MLLM:
    """Loads a folder with `config.json` and safetensors.

    Raises:
      UserError: when the folder is not a checkpoint or its architecture is not supported.
    """
    folder = Path(folder)
    config, hf = pretrained_config(folder), _read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file")
    where = {}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            where |= {_state_dict_name(name): (file, name) for name in tensors.keys()}  # noqa: SIM118

    def get(name):
        file, stored = where[name]
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(stored)

    return build_model(config, import_state(config, hf, get, where), tuning)
