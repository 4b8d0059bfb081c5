"""Qwen 2 (and 2.5) and Qwen 3: LLaMA with biases, then with normalised queries and keys."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.decoder import DecoderConfig
from moresjax.weights.families.base import HFConfig, register
from moresjax.weights.families.llama import Llama
from moresjax.weights.families.rope import LAYER_KEYS, layers_from_hf, layers_to_hf


@register
class Qwen2(Llama):
    """`Qwen2ForCausalLM`: queries, keys and values have biases, whatever the file says."""

    model_type = "qwen2"
    keys = (
        Llama.keys
        | LAYER_KEYS
        | ConfigKeys(
            neutral={"mlp_bias": (False,)},
            irrelevant={"attention_bias": "queries, keys and values always have biases"},
        )
    )

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """LLaMA's fields, local layers, biases."""
        biases = {"qkv_bias": True, "out_bias": False}
        return super().from_hf(hf) | layers_from_hf(hf) | biases

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """LLaMA's settings and the local layers."""
        window = {"use_sliding_window": bool(config.window), "max_window_layers": 0}
        return super().to_hf(config) | layers_to_hf(config) | window


@register
class Qwen3(Llama):
    """`Qwen3ForCausalLM`."""

    model_type = "qwen3"
    keys = Llama.keys | LAYER_KEYS | ConfigKeys(neutral={"mlp_bias": (False,)})
    name_map = Llama.name_map | {
        "blocks.attn.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    }

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """LLaMA's fields, local layers, normalised queries and keys."""
        return super().from_hf(hf) | layers_from_hf(hf) | {"qk_norm": True}

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """LLaMA's settings and the local layers."""
        window = {"use_sliding_window": bool(config.window), "max_window_layers": 0}
        return super().to_hf(config) | layers_to_hf(config) | window
