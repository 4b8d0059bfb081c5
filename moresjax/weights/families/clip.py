"""CLIP's vision encoder."""

from typing import Any

from moresjax.models.vision import OPENAI_MEAN, OPENAI_STD, VisionConfig
from moresjax.weights.families.base import HFConfig, VisionFamily, register
from moresjax.weights.families.siglip import Siglip


@register
class Clip(VisionFamily):
    """`CLIPVisionModel`: a class token, and a norm before the first block."""

    model_type = "clip_vision_model"
    two_towers = "clip"
    name_map = Siglip.name_map | {
        "cls": "embeddings.class_embedding",
        "pre_norm": "pre_layrnorm",
    }
    keys = Siglip.keys
    prefixes = ("vision_model.",)
    unused = ("position_ids",)
    beside = ("text_model.", "text_projection", "visual_projection", "logit_scale")

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """A class token, a norm before the blocks, OpenAI's normalisation of images."""
        return {
            "intermediate_size": hf["intermediate_size"],
            "class_token": True,
            "pre_norm": True,
            "patch_bias": False,
            "pixel_mean": OPENAI_MEAN,
            "pixel_std": OPENAI_STD,
        }

    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """The width of the MLP."""
        return {"intermediate_size": config.intermediate_size}
