"""StableLM 2: LLaMA with layer norms and a rotation of some of each head's features."""

from collections.abc import Sequence
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.models.decoder import DecoderConfig
from moresjax.models.layers import ROPE_SCALINGS
from moresjax.weights.families.base import (
    ACTIVATIONS,
    HFConfig,
    LLMFamily,
    activation,
    hf_activation,
    register,
)
from moresjax.weights.families.keys import DROPOUT, LLM_KEYS
from moresjax.weights.families.llama import Llama
from moresjax.weights.families.rope import (
    PARTIAL_ROPE_KEYS,
    rope_from_hf,
    rope_parameters,
    rope_to_hf,
)


class PartlyRotated(LLMFamily):
    """What StableLM and Phi share.

    Attributes:
      rotary_fraction: The share of each head's features that is rotated, where a file has none.
      rope_scalings: The supported ones.
    """

    keys = (
        LLM_KEYS
        | PARTIAL_ROPE_KEYS
        | ConfigKeys(
            implemented=("intermediate_size", "layer_norm_eps"),
            choices={"hidden_act": tuple(ACTIVATIONS)},
            neutral={"qk_layernorm": (False,)},
        )
    )
    rotary_fraction: float
    rope_scalings: Sequence[str] = ROPE_SCALINGS

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Layer norms and a partial rotation."""
        rope = rope_parameters(hf)
        fraction = rope.pop("partial_rotary_factor", self.rotary_fraction)
        return {
            **rope_from_hf(rope, self.rope_scalings),
            "rotary_fraction": float(fraction),
            "intermediate_size": hf["intermediate_size"],
            "activation": activation(hf["hidden_act"]),
            "norm": "layer",
            "norm_eps": hf["layer_norm_eps"],
        }

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        fraction = {"partial_rotary_factor": config.rotary_fraction}
        return {
            "rope_parameters": rope_to_hf(config) | fraction,
            "intermediate_size": config.intermediate_size,
            "hidden_act": hf_activation(config.activation),
            "layer_norm_eps": config.norm_eps,
        }


@register
class StableLm(PartlyRotated):
    """`StableLmForCausalLM`."""

    model_type = "stablelm"
    keys = PartlyRotated.keys | ConfigKeys(
        implemented=("use_qkv_bias", "use_parallel_residual"),
        irrelevant={"hidden_dropout": DROPOUT},
    )
    name_map = Llama.name_map
    rotary_fraction = 0.25

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Whether the branches are parallel, and the biases."""
        return super().from_hf(hf) | {
            "parallel": hf.get("use_parallel_residual", False),
            "qkv_bias": hf.get("use_qkv_bias", False),
        }

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        return super().to_hf(config) | {
            "use_parallel_residual": config.parallel,
            "use_qkv_bias": config.qkv_bias,
        }
