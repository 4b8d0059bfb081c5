"""OPT: learned positions and plain MLPs."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.decoder import DecoderConfig
from moresjax.weights.families.base import (
    ACTIVATIONS,
    HFConfig,
    LLMFamily,
    activation,
    hf_activation,
    register,
)
from moresjax.weights.families.keys import DROPOUT, LLM_KEYS, NEW_WEIGHTS


@register
class Opt(LLMFamily):
    """`OPTForCausalLM` with norms before the branches (all sizes but 350M)."""

    model_type = "opt"
    name_map = {
        "embed": "model.decoder.embed_tokens",
        "position": "model.decoder.embed_positions.weight",
        "blocks.attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
        "blocks.attn.q": "model.decoder.layers.{}.self_attn.q_proj",
        "blocks.attn.k": "model.decoder.layers.{}.self_attn.k_proj",
        "blocks.attn.v": "model.decoder.layers.{}.self_attn.v_proj",
        "blocks.attn.o": "model.decoder.layers.{}.self_attn.out_proj",
        "blocks.mlp_norm": "model.decoder.layers.{}.final_layer_norm",
        "blocks.mlp.up": "model.decoder.layers.{}.fc1",
        "blocks.mlp.down": "model.decoder.layers.{}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    }
    keys = LLM_KEYS | ConfigKeys(
        implemented=("ffn_dim", "word_embed_proj_dim", "enable_bias"),
        choices={"activation_function": tuple(ACTIVATIONS)},
        neutral={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
        irrelevant={
            **dict.fromkeys(("dropout", "activation_dropout", "layerdrop"), DROPOUT),
            "init_std": NEW_WEIGHTS,
        },
    )

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Learned positions, layer norms, plain MLPs, biases."""
        width = hf.get("word_embed_proj_dim") or hf["hidden_size"]
        if width != hf["hidden_size"]:
            raise UserError(
                f"opt with word_embed_proj_dim={width}, which is not "
                f"hidden_size={hf['hidden_size']}, is not supported"
            )
        bias = hf.get("enable_bias", True)
        return {
            "positions": "learned",
            "position_offset": 2,
            "intermediate_size": hf["ffn_dim"],
            "activation": activation(hf["activation_function"]),
            "norm": "layer",
            "norm_eps": 1e-5,
            "gated_mlp": False,
            "qkv_bias": bias,
            "out_bias": bias,
            "mlp_bias": bias,
        }

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        return {
            "ffn_dim": config.intermediate_size,
            "word_embed_proj_dim": config.hidden_size,
            "activation_function": hf_activation(config.activation),
            "enable_bias": config.qkv_bias,
        }
