"""TinyLLaVA Factory's models, whole or as the folders of a training stage."""

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import HFConfig, MLLMFamily, decoder_config, register
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
        keeps_all = hf["vision_feature_select_strategy"] == "cls_patch"
        llm = decoder_config(hf["text_config"])
        return MLLMConfig(llm=llm, vision=vision_tower(hf, keeps_all), connector=connector)

    def connector_map(self, connector: str) -> dict[str, str]:
        """The name map of the connector; activations stand between the linears."""
        if connector == "linear":
            return {"layers.0": "connector"}
        widths = linear_widths(connector, 1, 1) or []
        return {f"layers.{i}": f"connector.{2 * i}" for i in range(len(widths) - 1)}
