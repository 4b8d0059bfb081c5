"""Phi 1.5 and 2: one norm feeds attention and MLP, whose outputs are added; biases everywhere."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.weights.families.base import HFConfig, register
from moresjax.weights.families.keys import DROPOUT
from moresjax.weights.families.stablelm import PartlyRotated


@register
class Phi(PartlyRotated):
    """`PhiForCausalLM`."""

    model_type = "phi"
    keys = PartlyRotated.keys | ConfigKeys(
        irrelevant=dict.fromkeys(("resid_pdrop", "embd_pdrop"), DROPOUT)
    )
    name_map = {
        "embed": "model.embed_tokens",
        "blocks.attn_norm": "model.layers.{}.input_layernorm",
        "blocks.attn.q": "model.layers.{}.self_attn.q_proj",
        "blocks.attn.k": "model.layers.{}.self_attn.k_proj",
        "blocks.attn.v": "model.layers.{}.self_attn.v_proj",
        "blocks.attn.o": "model.layers.{}.self_attn.dense",
        "blocks.mlp.up": "model.layers.{}.mlp.fc1",
        "blocks.mlp.down": "model.layers.{}.mlp.fc2",
        "norm": "model.final_layernorm",
        "head": "lm_head",
        "head_bias": "lm_head.bias",
    }
    rotary_fraction = 0.5
    rope_scalings = ("default",)

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """StableLM's fields with a plain MLP, parallel branches and biases."""
        return super().from_hf(hf) | {
            "gated_mlp": False,
            "parallel": True,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "head_bias": True,
        }
