"""TinyLLaVA Factory's models, whole or as the folders of a training stage.

The factory (TinyLLaVA/TinyLLaVA_Factory, 53f12c7) makes the parts of a model by the names of those
that it was trained from and then fills in `text_config` and `vision_config`: a folder without such
names gets another architecture there.
"""

import dataclasses
import re
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
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
from moresjax.weights.families.keys import COMMON_KEYS, NEW_WEIGHTS, ORIGIN, TOKENS
from moresjax.weights.families.llava import two_linears, vision_tower

OWN_ROWS = "rows and labels are built otherwise here"
RESAMPLER = "it belongs to connectors that are refused"
TRAINING = "it says how the model was trained"

# Folders that a training stage leaves, and what completes the names of the tensors in them.
STAGE_FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}

# Of each family that the factory has, a model whose name stands for the family there.
LLMS = {
    "phi": "microsoft/phi-2",
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b",
    "gemma": "google/gemma-2b-it",
    "qwen2": "Qwen/Qwen2-0.5B",
}
ENCODERS = {
    "siglip_vision_model": "google/siglip-so400m-patch14-384",
    "clip_vision_model": "openai/clip-vit-large-patch14-336",
}


@register
class TinyLlava(MLLMFamily):
    """`TinyLlavaForConditionalGeneration`, of which `transformers` knows the two towers only."""

    model_type = "tinyllava"
    keys = COMMON_KEYS | ConfigKeys(
        implemented=(
            "text_config",
            "vision_config",
            "connector_type",
            "vision_feature_layer",
            "image_aspect_ratio",
        ),
        choices={"vision_feature_select_strategy": ("patch", "cls_patch")},
        irrelevant={
            **dict.fromkeys(("vocab_size", "hidden_size"), "text_config says it"),
            "vision_hidden_size": "vision_config says it",
            **dict.fromkeys(("num_queries", "num_resampler_layers"), RESAMPLER),
            "resampler_hidden_size": RESAMPLER,
            **dict.fromkeys(("ignore_index", "image_token_index"), OWN_ROWS),
            **dict.fromkeys(("llm_model_name_or_path", "tokenizer_name_or_path"), ORIGIN),
            **dict.fromkeys(("vision_model_name_or_path", "vision_model_name_or_path2"), ORIGIN),
            "cache_dir": ORIGIN,
            **dict.fromkeys(("tune_type_llm", "tune_type_connector"), TRAINING),
            **dict.fromkeys(("tune_type_vision_tower", "tune_embed_tokens"), TRAINING),
            "tune_vision_tower_from_layer": TRAINING,
            **dict.fromkeys(("tokenizer_model_max_length", "tokenizer_padding_side"), TRAINING),
            **dict.fromkeys(("tokenizer_use_fast", "pad_token"), TOKENS),
            "tie_word_embeddings": "text_config says it",
            "initializer_range": NEW_WEIGHTS,
        },
    )
    prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower._vision_tower.vision_model.": "model.vision_tower.",
        "vision_tower._vision_tower.": "model.vision_tower.",
        "connector._connector": "model.connector",
    }
    written = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower._vision_tower.vision_model.",
        "model.connector": "connector._connector",
    }
    in_transformers = False

    def from_hf(self, hf: HFConfig) -> MLLMConfig:
        """The whole model that a `config.json` describes.

        Raises:
          UserError: for a connector that is not a chain of linears.
        """
        self.keys.check(hf, "tinyllava in config.json")
        connector = hf["connector_type"]
        if linear_widths(connector, 1, 1) is None or two_linears(connector) not in (None, "gelu"):
            raise UserError(
                f"a TinyLLaVA Factory folder with connector {connector!r} is not supported; "
                "identity, linear and mlp{n}x_gelu are"
            )
        _check_one_layer(hf["vision_feature_layer"])
        keeps_all = hf["vision_feature_select_strategy"] == "cls_patch"
        llm = decoder_config(hf["text_config"])
        return MLLMConfig(llm=llm, vision=vision_tower(hf, keeps_all), connector=connector)

    def to_hf(self, config: MLLMConfig) -> dict[str, Any]:
        """The whole `config.json` of a model; the inverse of `from_hf`.

        Raises:
          UserError: when the factory has no such model.
        """
        vision = config.vision
        if not isinstance(vision, VisionConfig) or vision.registers:
            raise UserError("a TinyLLaVA Factory model has one vision encoder without registers")
        _check_one_layer(vision.feature_layer)
        if not re.fullmatch(r"identity|linear|mlp\d+x_gelu", config.connector):
            raise UserError(
                f"a TinyLLaVA Factory model with connector {config.connector} is not supported"
            )
        text = hf_decoder_config(config.llm)
        keeps_all = vision.first_feature == 0
        vision = dataclasses.replace(
            vision, select="cls_patch" if keeps_all else "patch", num_trainable_blocks=0
        )
        # Normalisation is the image processor's, the choice of features the whole model's.
        free = ("feature_layer", "select", "drop_first_token", "pixel_mean", "pixel_std")
        chosen = {name: getattr(vision, name) for name in free}
        tower = hf_vision_config(vision, lambda hf: vision_config(hf, **chosen))
        for known, found, what in (
            (LLMS, text["model_type"], "LLM"),
            (ENCODERS, tower["model_type"], "vision encoder"),
        ):
            if found not in known:
                raise UserError(f"a folder of TinyLLaVA Factory has no {what} of kind {found} here")
        llm = LLMS[text["model_type"]]
        return {
            "model_type": self.model_type,
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "llm_model_name_or_path": llm,
            "tokenizer_name_or_path": llm,
            "vision_model_name_or_path": ENCODERS[tower["model_type"]],
            "vision_model_name_or_path2": "",
            "connector_type": config.connector,
            "text_config": text,
            "hidden_size": config.llm.hidden_size,
            "vocab_size": config.llm.vocab_size,
            "tokenizer_model_max_length": config.llm.max_positions,
            "vision_config": tower,
            "vision_hidden_size": vision.hidden_size,
            "vision_feature_layer": vision.feature_layer,
            "vision_feature_select_strategy": vision.select,
            "image_aspect_ratio": "square",
            "image_token_index": -200,
            "ignore_index": -100,
        }

    def connector_map(self, connector: str) -> dict[str, str]:
        """The name map of the connector; activations stand between the linears."""
        if connector == "linear":
            return {"layers.0": "connector"}
        widths = linear_widths(connector, 1, 1) or []
        return {f"layers.{i}": f"connector.{2 * i}" for i in range(len(widths) - 1)}


def _check_one_layer(layer: object) -> None:
    """Refuses features of several layers.

    Raises:
      UserError: for a list of layers.
    """
    if not isinstance(layer, int):
        raise UserError(
            f"a TinyLLaVA Factory model has one feature layer, not vision_feature_layer={layer}"
        )
