"""Mistral: LLaMA with a sliding window in every layer."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.decoder import DecoderConfig
from moresjax.weights.families.base import HFConfig, register
from moresjax.weights.families.llama import Llama


@register
class Mistral(Llama):
    """`MistralForCausalLM`; releases after the first have no window."""

    model_type = "mistral"
    keys = (
        Llama.keys
        | ConfigKeys(implemented=("sliding_window",))
        | ConfigKeys(neutral={"attention_bias": (False,), "mlp_bias": (False,)})
    )

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """LLaMA's fields and the window."""
        window = hf.get("sliding_window")
        local = {"window": window, "attention_pattern": "l"} if window else {}
        return super().from_hf(hf) | local

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """LLaMA's settings and the window."""
        return super().to_hf(config) | {"sliding_window": config.window or None}
