"""LLaVA 1.5 as `transformers` has it."""

import dataclasses
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.weights.families.base import (
    ACTIVATIONS,
    HFConfig,
    MLLMFamily,
    activation,
    decoder_config,
    hf_activation,
    hf_decoder_config,
    hf_vision_config,
    register,
    vision_config,
)
from moresjax.weights.families.keys import COMMON_KEYS

# Of every LLaVA of `transformers`.
LLAVA_KEYS = COMMON_KEYS | ConfigKeys(
    implemented=(
        "text_config",
        "vision_config",
        "vision_feature_layer",
        "tie_word_embeddings",
        "image_token_index",
    ),
    choices={"projector_hidden_act": tuple(ACTIVATIONS)},
    irrelevant={
        "image_seq_length": "the size of image and patch says it",
        "ignore_index": "labels are masked otherwise here",
        "vocab_size": "text_config says it",
        "hidden_size": "text_config says it",
    },
)


@register
class Llava(MLLMFamily):
    """`LlavaForConditionalGeneration`."""

    model_type = "llava"
    keys = LLAVA_KEYS | ConfigKeys(
        choices={"vision_feature_select_strategy": ("default", "full")},
        neutral={"multimodal_projector_bias": (True,)},
    )
    prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    # The names of published LLaVAs, which older and newer versions of transformers read.
    written = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    connector = {
        "layers.0": "multi_modal_projector.linear_1",
        "layers.1": "multi_modal_projector.linear_2",
    }
    before = ""  # what precedes the two linears in the name of the connector
    architecture = "LlavaForConditionalGeneration"
    image_mark = "<image>"

    def from_hf(self, hf: HFConfig) -> MLLMConfig:
        """The whole model that a `config.json` describes."""
        self.keys.check(hf, f"{self.model_type} in config.json")
        llm = decoder_config(hf["text_config"])
        # The wrapper's own head is bare: no bias over Phi, no soft cap over Gemma 2.
        llm = dataclasses.replace(
            llm,
            head_bias=False,
            logit_softcap=0.0,
            tie_embeddings=llm.tie_embeddings or hf.get("tie_word_embeddings", False),
        )
        keeps_all = hf.get("vision_feature_select_strategy") == "full"
        connector = f"{self.before}mlp2x_{activation(hf['projector_hidden_act'])}"
        return MLLMConfig(llm=llm, vision=vision_tower(hf, keeps_all), connector=connector)

    def connector_map(self, connector: str) -> dict[str, str]:
        """The name map of the two linears."""
        return self.connector

    def settings(self, keeps_all: bool) -> dict[str, Any]:
        """The settings of `config.json` that other wrappers have not.

        Args:
          keeps_all: Whether the connector reads all tokens of the encoder.

        Raises:
          UserError: when the wrapper has no such choice.
        """
        strategy = "full" if keeps_all else "default"
        return {"vision_feature_select_strategy": strategy, "multimodal_projector_bias": True}

    def to_hf(self, config: MLLMConfig) -> dict[str, Any]:
        """The whole `config.json` of a model; the inverse of `from_hf`.

        Raises:
          UserError: when no LLaVA is the same.
        """
        vision = config.vision
        if (
            not isinstance(vision, VisionConfig)
            or vision.registers
            or not config.connector.startswith(self.before)
            or (between := two_linears(config.connector.removeprefix(self.before))) is None
        ):
            raise UserError(
                "a Hugging Face LLaVA has one vision encoder without registers and connector "
                f"{self.before}mlp2x_gelu; this model has connector {config.connector}"
            )
        keeps_all = vision.first_feature == 0
        select = "cls_patch" if keeps_all else "patch"
        vision = dataclasses.replace(vision, select=select, num_trainable_blocks=0)
        # Normalisation is the image processor's, the choice of features the wrapper's.
        free = ("feature_layer", "select", "drop_first_token", "pixel_mean", "pixel_std")
        chosen = {name: getattr(vision, name) for name in free}
        hf = {
            "model_type": self.model_type,
            "vision_config": hf_vision_config(vision, lambda hf: vision_config(hf, **chosen)),
            "vision_feature_layer": vision.feature_layer,
            "tie_word_embeddings": config.llm.tie_embeddings,
            "image_seq_length": config.visual_tokens,
            "projector_hidden_act": hf_activation(between),
            **self.settings(keeps_all),
        }

        def read(text: HFConfig) -> DecoderConfig:
            return self.from_hf(hf | {"text_config": text}).llm

        return hf | {"text_config": hf_decoder_config(config.llm, read, "LLM in a LLaVA")}

    def processor(
        self, image_processor: Any, tokenizer: Any, config: MLLMConfig, hf: HFConfig
    ) -> Any:
        """`LlavaProcessor`."""
        from transformers import LlavaProcessor

        vision = config.vision
        assert isinstance(vision, VisionConfig)  # as `to_hf` wants it
        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=hf["vision_feature_select_strategy"],
            num_additional_image_tokens=int(vision.class_token),
            image_token=self.image_mark,
        )


def two_linears(connector: str) -> str | None:
    """The activation between the two linears of a connector; None for another kind."""
    kind, _, name = connector.partition("_")
    return name if kind == "mlp2x" and linear_widths(connector, 1, 1) else None


def vision_tower(hf: HFConfig, keeps_all: bool) -> VisionConfig:
    """The vision encoder of a whole model's `config.json`.

    Args:
      hf: The content of `config.json`.
      keeps_all: Whether the connector reads all tokens of the encoder, the first one included.

    Raises:
      UserError: for an encoder with register tokens, which the references hand to the LLM.
    """
    vision = vision_config(
        hf["vision_config"],
        feature_layer=hf["vision_feature_layer"],
        select="cls_patch" if keeps_all else "patch",
    )
    if vision.registers:
        raise UserError("a LLaVA folder whose vision encoder has register tokens is not supported")
    # "default" drops the first token whether or not it is a class token.
    return dataclasses.replace(vision, drop_first_token=not keeps_all and not vision.class_token)
