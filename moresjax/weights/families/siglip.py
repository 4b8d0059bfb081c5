"""SigLIP's vision encoder.

SigLIP 2's checkpoints of a fixed resolution say `siglip_vision_model` and have SigLIP's layout.
`siglip2_vision_model` is the other kind, which takes images of any shape cut into patches; it is
not supported.
"""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.vision import VisionConfig
from moresjax.weights.families.base import HFConfig, VisionFamily, register
from moresjax.weights.families.keys import COMPARISON, NEW_WEIGHTS, VISION_KEYS


@register
class Siglip(VisionFamily):
    """`SiglipVisionModel` without its pooling head."""

    model_type = "siglip_vision_model"
    two_towers = "siglip"
    name_map = {
        "position": "embeddings.position_embedding.weight",
        "patch": "embeddings.patch_embedding",
        "blocks.attn_norm": "encoder.layers.{}.layer_norm1",
        "blocks.attn.q": "encoder.layers.{}.self_attn.q_proj",
        "blocks.attn.k": "encoder.layers.{}.self_attn.k_proj",
        "blocks.attn.v": "encoder.layers.{}.self_attn.v_proj",
        "blocks.attn.o": "encoder.layers.{}.self_attn.out_proj",
        "blocks.mlp_norm": "encoder.layers.{}.layer_norm2",
        "blocks.mlp.up": "encoder.layers.{}.mlp.fc1",
        "blocks.mlp.down": "encoder.layers.{}.mlp.fc2",
        "post_norm": "post_layernorm",
    }
    keys = VISION_KEYS | ConfigKeys(
        implemented=("intermediate_size",),
        irrelevant={
            "vision_use_head": "the pooling head is not read",
            "projection_dim": COMPARISON,
            "initializer_factor": NEW_WEIGHTS,
        },
    )
    prefixes = ("vision_model.",)
    unused = ("position_ids", "vision_tower.head.")
    beside = ("text_model.", "logit_scale", "logit_bias", "head.")

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """The width of the MLP; all else is the default."""
        return {"intermediate_size": hf["intermediate_size"]}

    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """The width of the MLP, and no pooling head."""
        return {"vision_use_head": False, "intermediate_size": config.intermediate_size}
