"""TinyLLaVA Factory's models, whole or as the folders of a training stage."""

from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import HFConfig, MLLMFamily, decoder_config, register
from moresjax.weights.families.llava import vision_tower

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
        connector = hf["connector_type"]
        if linear_widths(connector, 1, 1) is None:
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
