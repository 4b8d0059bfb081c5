"""LLaVA as its authors publish it: `liuhaotian/llava-v1.5-7b`.

Source: haotian-liu/LLaVA, `multimodal_projector/builder.py` (44e0562) for the connectors,
`multimodal_encoder/clip_encoder.py` (380436b) for the choice of features, `llava_arch.py` (015f6b7)
for the rest. No published folder was at hand.

`config.json` is that of the LLM with keys `mm_*` added, its `model_type` is `llava` or
`llava_llama`. The weights are those of the LLM and of the connector, `model.mm_projector`; the
vision tower is another folder, which `mm_vision_tower` names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import HFConfig, MLLMFamily, decoder_config, register
from moresjax.weights.families.llava import two_linears, vision_tower

TRAINING = "it says how the model was trained"
TOWER = "the tower's own config.json says it"
# The key that only these folders have.
TOWER_KEY = "mm_vision_tower"
# Names of tensors in files -> in the state dict of the LLaVA of transformers 5.
RENAMED = {
    "model.mm_projector.": "model.mm_projector.",
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.": "model.language_model.",
}


@register
class LlavaOriginal(MLLMFamily):
    """`LlavaLlamaForCausalLM`, of versions 1 and 1.5."""

    model_type = "llava_llama"
    keys = ConfigKeys(
        implemented=(
            "model_type",
            "text_config",
            "vision_config",
            "vision_feature_layer",
            "image_aspect_ratio",
            TOWER_KEY,
            "mm_projector_type",
            "mm_vision_select_layer",
        ),
        choices={"mm_vision_select_feature": ("patch", "cls_patch")},
        neutral={
            "mm_use_im_start_end": (False,),
            "mm_resampler_type": (None, "identity"),
            "mm_patch_merge_type": (None, "flat"),
            "use_mm_proj": (True,),
            "s2": (None, False),
            **dict.fromkeys(("image_grid_pinpoints", "image_crop_resolution"), (None,)),
            "image_split_resolution": (None,),
        },
        irrelevant={
            "mm_hidden_size": TOWER,
            "mm_use_im_patch_token": "the token that it adds stands in no prompt",
            **dict.fromkeys(("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"), TRAINING),
            **dict.fromkeys(("freeze_mm_vision_resampler", "tune_mm_vision_resampler"), TRAINING),
            **dict.fromkeys(("unfreeze_mm_vision_tower", "mm_vision_tower_lr"), TRAINING),
            **dict.fromkeys(("mm_projector_lr", "mm_tunable_parts", "pretrain_cfg"), TRAINING),
            "tokenizer_model_max_length": "rows that are too long are refused here, not cut",
            "tokenizer_padding_side": "rows are padded otherwise here",
            **dict.fromkeys(("vision_tower_pretrained", "s2_scales"), TOWER),
        },
    )
    prefixes = {}
    written = {}
    in_transformers = False

    def from_hf(self, hf: HFConfig) -> MLLMConfig:
        """The whole model that a `config.json`, completed by `complete`, describes.

        Raises:
          UserError: for a connector that is not a chain of linears.
        """
        self.keys.check(hf, "llava of its authors in config.json")
        connector = hf.get("mm_projector_type") or "linear"
        if linear_widths(connector, 1, 1) is None or two_linears(connector) not in (None, "gelu"):
            raise UserError(
                f"mm_projector_type={connector} is not supported; identity, linear and "
                "mlp{n}x_gelu are"
            )
        keeps_all = hf.get("mm_vision_select_feature") == "cls_patch"
        llm = decoder_config(hf["text_config"])
        return MLLMConfig(llm=llm, vision=vision_tower(hf, keeps_all), connector=connector)

    def to_hf(self, config: MLLMConfig) -> dict[str, Any]:
        """Nothing: the format is read only, as it cannot hold a vision tower's configuration.

        Raises:
          UserError: always.
        """
        raise UserError("LLaVA folders in their authors' format are read, not written")

    def connector_map(self, connector: str) -> dict[str, str]:
        """The name map of the connector; activations stand between the linears."""
        if connector == "linear":
            return {"layers.0": "mm_projector"}
        widths = linear_widths(connector, 1, 1) or []
        return {f"layers.{i}": f"mm_projector.{2 * i}" for i in range(len(widths) - 1)}


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether this is the `config.json` of a LLaVA as its authors publish it."""
    return raw.get("model_type") in ("llava", LlavaOriginal.model_type) and TOWER_KEY in raw


def complete(raw: Mapping[str, Any], tower: HFConfig) -> dict[str, Any]:
    """The whole `config.json` with a part for each tower, from that of the folder.

    Args:
      raw: The folder's own.
      tower: That of the vision encoder.
    """
    from transformers import AutoConfig

    own = {key: x for key, x in raw.items() if key in LlavaOriginal.keys.listed}
    text = {key: x for key, x in raw.items() if key not in own and key != "architectures"}
    return own | {
        "model_type": LlavaOriginal.model_type,
        "text_config": AutoConfig.for_model("llama", **text).to_dict(),
        "vision_config": dict(tower),
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
    }


def find_tower(folder: Path, raw: Mapping[str, Any]) -> Path:
    """The folder of the vision tower: the path that is named, or its last part inside or beside.

    Args:
      folder: The LLaVA's folder.
      raw: The content of its `config.json`.

    Raises:
      UserError: when it is at none of these places.
    """
    named = str(raw[TOWER_KEY])
    last = Path(named).name
    places = [Path(named), folder / named, folder / last, folder.parent / last]
    for place in places:
        if (place / "config.json").is_file():
            return place.resolve()
    raise UserError(
        f"{folder} names its vision tower {named}, which is not here; put that folder beside it as "
        f"{folder.parent / last}, or name it (import --vision DIR, load(vision_tower=DIR))"
    )
