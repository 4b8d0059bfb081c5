"""LLaMA, and what the families share that changed little of it."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.decoder import DecoderConfig
from moresjax.weights.families.base import (
    ACTIVATIONS,
    HFConfig,
    LLMFamily,
    activation,
    hf_activation,
    register,
)
from moresjax.weights.families.keys import LLM_KEYS
from moresjax.weights.families.rope import ROPE_KEYS, rope_from_hf, rope_parameters, rope_to_hf


@register
class Llama(LLMFamily):
    """`LlamaForCausalLM`: LLaMA 1 to 3, Vicuna, TinyLlama."""

    model_type = "llama"
    name_map = {
        "embed": "model.embed_tokens",
        "blocks.attn_norm": "model.layers.{}.input_layernorm",
        "blocks.attn.q": "model.layers.{}.self_attn.q_proj",
        "blocks.attn.k": "model.layers.{}.self_attn.k_proj",
        "blocks.attn.v": "model.layers.{}.self_attn.v_proj",
        "blocks.attn.o": "model.layers.{}.self_attn.o_proj",
        "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.mlp.up": "model.layers.{}.mlp.up_proj",
        "blocks.mlp.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    }
    keys = (
        LLM_KEYS
        | ROPE_KEYS
        | ConfigKeys(
            implemented=("intermediate_size", "rms_norm_eps", "attention_bias", "mlp_bias"),
            choices={"hidden_act": tuple(ACTIVATIONS)},
        )
    )

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Rotary embeddings, a gated MLP, RMS norms, biases if the file says so."""
        return {
            **rope_from_hf(rope_parameters(hf)),
            "intermediate_size": hf["intermediate_size"],
            "activation": activation(hf["hidden_act"]),
            "norm_eps": hf["rms_norm_eps"],
            "qkv_bias": hf.get("attention_bias", False),
            "out_bias": hf.get("attention_bias", False),
            "mlp_bias": hf.get("mlp_bias", False),
        }

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        return {
            "rope_parameters": rope_to_hf(config),
            "intermediate_size": config.intermediate_size,
            "hidden_act": hf_activation(config.activation),
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
        }
