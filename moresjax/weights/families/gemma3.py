"""Gemma 3 with images: SigLIP, means of squares of patches, a norm, a projection."""

import dataclasses
import math
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import RMS_NORM_EPS, pooled_side
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.weights.families.base import (
    HFConfig,
    MLLMFamily,
    decoder_config,
    hf_decoder_config,
    hf_vision_config,
    register,
    vision_config,
)
from moresjax.weights.families.keys import COMMON_KEYS, NEW_WEIGHTS
from moresjax.weights.families.llava import Llava

PROCESSOR = "the processor says it"


@register
class Gemma3Images(MLLMFamily):
    """`Gemma3ForConditionalGeneration`."""

    model_type = "gemma3"
    keys = COMMON_KEYS | ConfigKeys(
        implemented=(
            "text_config",
            "vision_config",
            "mm_tokens_per_image",
            "tie_word_embeddings",
            "image_token_index",
        ),
        irrelevant={
            **dict.fromkeys(("boi_token_index", "eoi_token_index"), PROCESSOR),
            **dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id"), PROCESSOR),
            "initializer_range": NEW_WEIGHTS,
        },
    )
    prefixes = Llava.prefixes
    written = Llava.written
    architecture = "Gemma3ForConditionalGeneration"
    image_mark = "<image_soft_token>"
    template = "gemma3"

    def from_hf(self, hf: HFConfig) -> MLLMConfig:
        """The whole model that a `config.json` describes."""
        self.keys.check(hf, "gemma3 in config.json")
        llm = decoder_config(hf["text_config"])
        # The wrapper's own head is bare.
        llm = dataclasses.replace(
            llm,
            logit_softcap=0.0,
            image_attention="bidirectional",
            tie_embeddings=llm.tie_embeddings or hf.get("tie_word_embeddings", True),
        )
        vision = vision_config(hf["vision_config"], feature_layer=-1)
        vision = dataclasses.replace(vision, feature_norm_eps=vision.norm_eps)
        if vision.class_token or vision.norm_eps != RMS_NORM_EPS:
            raise UserError(
                f"gemma3 with a vision encoder {vision.model_type} of layer_norm_eps="
                f"{vision.norm_eps} is not supported, only SigLIP with {RMS_NORM_EPS}"
            )
        side, tokens = math.isqrt(vision.num_patches), hf["mm_tokens_per_image"]
        square = side // math.isqrt(tokens)
        if square < 1 or (side // square) ** 2 != tokens or side % square:
            raise UserError(
                f"gemma3 with mm_tokens_per_image={tokens} is not supported: {side} x {side} "
                "patches are not that many equal squares"
            )
        return MLLMConfig(llm=llm, vision=vision, connector=_connector(square))

    def connector_map(self, connector: str) -> dict[str, str]:
        """The norm, and the projection, which is stored as ours is."""
        return {
            "norm": "multi_modal_projector.mm_soft_emb_norm",
            "layers.0.kernel": "multi_modal_projector.mm_input_projection_weight",
        }

    def to_hf(self, config: MLLMConfig) -> dict[str, Any]:
        """The whole `config.json` of a model; the inverse of `from_hf`.

        Raises:
          UserError: when no Gemma 3 is the same.
        """
        vision = config.vision
        if (
            not isinstance(vision, VisionConfig)
            or config.connector != _connector(pooled_side(config.connector))
            or vision.feature_layer != -1
        ):
            raise UserError(
                f"a Gemma 3 has connector {_connector(4)} behind the last layer of a SigLIP; this "
                f"model has connector {config.connector}"
            )
        own = ("feature_layer", "feature_norm_eps", "pixel_mean", "pixel_std")
        chosen = {name: getattr(vision, name) for name in own}
        vision = dataclasses.replace(vision, num_trainable_blocks=0)
        hf = {
            "model_type": self.model_type,
            "vision_config": hf_vision_config(vision, lambda hf: vision_config(hf, **chosen)),
            "mm_tokens_per_image": config.visual_tokens,
            "tie_word_embeddings": config.llm.tie_embeddings,
        }

        def read(text: HFConfig) -> DecoderConfig:
            return self.from_hf(hf | {"text_config": text}).llm

        return hf | {"text_config": hf_decoder_config(config.llm, read, "LLM in a Gemma 3")}

    def processor(
        self, image_processor: Any, tokenizer: Any, config: MLLMConfig, hf: HFConfig
    ) -> Any:
        """`Gemma3Processor`."""
        from transformers import Gemma3Processor

        if not getattr(tokenizer, "boi_token", None):
            raise UserError(
                "a Gemma 3 with images is written with its own tokenizer only, which has tokens "
                "around images; this one has none"
            )
        return Gemma3Processor(
            image_processor,
            tokenizer,
            chat_template=tokenizer.chat_template,
            image_seq_length=config.visual_tokens,
        )


def _connector(square: int) -> str:
    return f"{f'pool{square}-' if square > 1 else ''}rmsnorm-linear-nobias"
