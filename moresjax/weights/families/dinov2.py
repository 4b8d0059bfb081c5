"""DINOv2, with and without register tokens."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from moresjax.weights.families.base import HFConfig, VisionFamily, register
from moresjax.weights.families.keys import DROPOUT, NEW_WEIGHTS, VISION_KEYS

BACKBONE = "it belongs to the backbones of detectors and segmenters"
GATED_MLP = {
    "blocks.mlp.gate": "encoder.layer.{}.mlp.gate_proj",
    "blocks.mlp.up": "encoder.layer.{}.mlp.up_proj",
    "blocks.mlp.down": "encoder.layer.{}.mlp.down_proj",
}


@register
class Dinov2(VisionFamily):
    """`Dinov2Model`, which is used at other image sizes than it was trained at."""

    model_type = "dinov2"
    name_map = {
        "cls": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "position": "embeddings.position_embeddings",
        "patch": "embeddings.patch_embeddings.projection",
        "blocks.attn_norm": "encoder.layer.{}.norm1",
        "blocks.attn.q": "encoder.layer.{}.attention.q_proj",
        "blocks.attn.k": "encoder.layer.{}.attention.k_proj",
        "blocks.attn.v": "encoder.layer.{}.attention.v_proj",
        "blocks.attn.o": "encoder.layer.{}.attention.o_proj",
        "blocks.attn_scale": "encoder.layer.{}.layer_scale1.lambda1",
        "blocks.mlp_norm": "encoder.layer.{}.norm2",
        "blocks.mlp.up": "encoder.layer.{}.mlp.fc1",
        "blocks.mlp.down": "encoder.layer.{}.mlp.fc2",
        "blocks.mlp_scale": "encoder.layer.{}.layer_scale2.lambda1",
        "post_norm": "layernorm",
    }
    keys = VISION_KEYS | ConfigKeys(
        implemented=("mlp_ratio", "qkv_bias", "use_swiglu_ffn"),
        irrelevant={
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), DROPOUT),
            "drop_path_rate": DROPOUT,
            "layerscale_value": NEW_WEIGHTS,
            "use_mask_token": "the mask token is not read",
            **dict.fromkeys(("apply_layernorm", "reshape_hidden_states"), BACKBONE),
            **dict.fromkeys(("out_features", "out_indices", "stage_names"), BACKBONE),
            **dict.fromkeys(("_out_features", "_out_indices"), BACKBONE),
        },
    )
    leading_ones = {
        "embeddings.cls_token": 2,
        "embeddings.register_tokens": 1,
        "embeddings.position_embeddings": 1,
    }
    position_embedding = "embeddings.position_embeddings"
    prefixes = ("dinov2.", "dinov2_with_registers.")
    old_modules = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "mlp.weights_out": "mlp.down_proj",
    }
    halves = {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")}
    unused = ("mask_token",)
    beside = ("classifier.",)

    def names(self, hf: HFConfig) -> dict[str, str]:
        """The name map of the variant that a `config.json` describes."""
        return self.name_map | GATED_MLP if hf.get("use_swiglu_ffn") else self.name_map

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """The width of the MLP, plain or gated, and ImageNet's normalisation of images."""
        width = int(hf["hidden_size"] * hf["mlp_ratio"])
        fields = {
            "intermediate_size": width,
            "class_token": True,
            "layer_scale": True,
            "qkv_bias": hf["qkv_bias"],
            "pixel_mean": IMAGENET_MEAN,
            "pixel_std": IMAGENET_STD,
        }
        if hf["use_swiglu_ffn"]:
            gated = {"gated_mlp": True, "activation": "silu"}
            fields |= {"intermediate_size": _gated_width(width)} | gated
        return fields

    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """The ratio of the MLP's width to the hidden size."""
        ratio = config.intermediate_size / config.hidden_size
        if config.gated_mlp:
            # Several ratios are rounded to one width; the published models have 4.
            usual = _gated_width(4 * config.hidden_size) == config.intermediate_size
            ratio = 4 if usual else 1.5 * ratio
        return {
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "qkv_bias": config.qkv_bias,
            "use_swiglu_ffn": config.gated_mlp,
            **({"hidden_act": "gelu"} if config.gated_mlp else {}),
        }


@register
class Dinov2WithRegisters(Dinov2):
    """`Dinov2WithRegistersModel`."""

    model_type = "dinov2_with_registers"
    keys = Dinov2.keys | ConfigKeys(implemented=("num_register_tokens",))

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """DINOv2's fields and the number of registers."""
        return super().from_hf(hf) | {"registers": hf["num_register_tokens"]}

    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """DINOv2's settings and the number of registers."""
        return super().to_hf(config) | {"num_register_tokens": config.registers}


def _gated_width(width: int) -> int:
    """Two thirds of the width of a plain MLP, rounded up to a multiple of eight."""
    return (int(width * 2 / 3) + 7) // 8 * 8
