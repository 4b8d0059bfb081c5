"""Our configuration of a Hugging Face vision `config.json`, family by family.

Source of the facts: the configuration and modelling files of transformers 5 (`CLIPVisionModel`,
`SiglipVisionModel`, `Dinov2Model`, `Dinov2WithRegistersModel`). SigLIP2's checkpoints of a fixed
resolution say `siglip_vision_model` and have SigLIP's layout; `siglip2_vision_model` is the other
kind, which takes images of any shape cut into patches, and is not supported.
"""

from collections.abc import Callable, Iterator, Mapping

from moresjax.core.errors import UserError, choice_error
from moresjax.models.vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    VisionConfig,
)
from moresjax.weights import tables
from moresjax.weights.configs import activation, hf_activation


def vision_config(hf: Mapping, **changes) -> VisionConfig:
    """Our configuration of a vision encoder's `config.json`; `changes` are fields of ours.

    Raises:
      UserError: for a family, or a variant of one, that is not supported.
    """
    family = hf["model_type"]
    if family not in VISION_FAMILIES:
        raise choice_error("vision encoder family", family, VISION_FAMILIES)
    _, fields = VISION_FAMILIES[family]
    common = {
        "image_size": _side(hf, "image_size"),
        "patch_size": _side(hf, "patch_size"),
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "norm_eps": hf["layer_norm_eps"],
        "activation": activation(hf["hidden_act"]),
    }
    return VisionConfig(**(common | fields(hf) | changes))


def _side(hf: Mapping, key: str) -> int:
    """Side of a square that the configuration may give as a pair."""
    value = hf[key]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UserError(f"{hf['model_type']} with {key}={value} is not supported: not a square")
    return int(sides.pop())


def _clip(hf: Mapping) -> dict:
    return {
        "intermediate_size": hf["intermediate_size"],
        "class_token": True,
        "pre_norm": True,
        "patch_bias": False,
        "pixel_mean": OPENAI_MEAN,
        "pixel_std": OPENAI_STD,
    }


def _siglip(hf: Mapping) -> dict:
    return {"intermediate_size": hf["intermediate_size"]}


def _dinov2(hf: Mapping) -> dict:
    width = int(hf["hidden_size"] * hf["mlp_ratio"])
    fields = {
        "intermediate_size": width,
        "class_token": True,
        "layer_scale": True,
        "qkv_bias": hf["qkv_bias"],
        "pixel_mean": IMAGENET_MEAN,
        "pixel_std": IMAGENET_STD,
    }
    if hf["use_swiglu_ffn"]:  # two thirds of the width, rounded up to a multiple of eight
        width = (int(width * 2 / 3) + 7) // 8 * 8
        fields |= {"intermediate_size": width, "gated_mlp": True, "activation": "silu"}
    return fields


def _dinov2_with_registers(hf: Mapping) -> dict:
    return _dinov2(hf) | {"registers": hf["num_register_tokens"]}


def hf_vision_candidates(config: VisionConfig) -> Iterator[dict]:
    """For every family, `config.json`s that come near to an encoder; `vision_config` tells which
    one means the same."""
    common = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu" if config.gated_mlp else hf_activation(config.activation),
    }
    width = {"intermediate_size": config.intermediate_size}
    yield {"model_type": "clip_vision_model", **common, **width}
    yield {"model_type": "siglip_vision_model", "vision_use_head": False, **common, **width}
    # The width of a gated MLP is rounded: several ratios give the same.
    wide = config.intermediate_size / config.hidden_size
    for ratio in (4, 1.5 * wide) if config.gated_mlp else (wide,):
        dinov2 = {
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "qkv_bias": config.qkv_bias,
            "use_swiglu_ffn": config.gated_mlp,
        }
        yield {"model_type": "dinov2", **common, **dinov2}


VISION_FAMILIES: dict[str, tuple[dict[str, str], Callable[[Mapping], dict]]] = {
    "clip_vision_model": (tables.CLIP, _clip),
    "siglip_vision_model": (tables.SIGLIP, _siglip),
    "dinov2": (tables.DINOV2, _dinov2),
    "dinov2_with_registers": (tables.DINOV2, _dinov2_with_registers),
}


def vision_table(hf: Mapping) -> dict[str, str]:
    """Name table of a vision encoder with this `config.json`."""
    table, _ = VISION_FAMILIES[hf["model_type"]]
    return table | tables.DINOV2_GATED_MLP if hf.get("use_swiglu_ffn") else table
