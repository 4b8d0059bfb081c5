"""Gemma 1, 2 and 3: scaled embeddings, norms around both branches, local layers, soft caps."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.decoder import DecoderConfig
from moresjax.weights.families.base import ACTIVATIONS, HFConfig, hf_activation, register
from moresjax.weights.families.llama import Llama
from moresjax.weights.families.qwen import Qwen3
from moresjax.weights.families.rope import (
    LAYER_KEYS,
    LAYERS,
    layers_from_hf,
    layers_to_hf,
    rope_from_hf,
    rope_parameters,
    rope_to_hf,
)


@register
class Gemma(Llama):
    """`GemmaForCausalLM`."""

    model_type = "gemma"
    keys = Llama.keys | ConfigKeys(
        choices={"hidden_activation": (None, *ACTIVATIONS)},
        neutral={"use_bidirectional_attention": (None, False), "mlp_bias": (False,)},
    )

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """LLaMA's fields; norms with an offset, embeddings scaled."""
        own = {"norm_offset": 1.0, "scale_embeddings": True}
        return super().from_hf({**hf, "hidden_act": self.activation_name(hf)}) | own

    def activation_name(self, hf: HFConfig) -> str:
        """The activation in the MLP.

        Raises:
          UserError: The two keys for it contradict each other; releases of transformers differ in
            which of them counts.
        """
        # Old files say "gelu" and mean the approximation.
        name = "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]
        if hf.get("hidden_activation") not in (None, name):
            raise UserError(
                f"gemma with hidden_act={hf['hidden_act']} and hidden_activation="
                f"{hf['hidden_activation']} is not supported: they must mean the same"
            )
        return name

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """LLaMA's settings; Gemma names its activation itself."""
        return super().to_hf(config) | {"hidden_activation": hf_activation(config.activation)}


@register
class Gemma2(Gemma):
    """`Gemma2ForCausalLM`."""

    model_type = "gemma2"
    keys = (
        Gemma.keys
        | LAYER_KEYS
        | ConfigKeys(
            implemented=(
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            ),
            irrelevant={"sliding_window_size": "sliding_window says it"},
        )
    )
    name_map = Gemma.name_map | {
        "blocks.attn_post_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "blocks.mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    }

    def activation_name(self, hf: HFConfig) -> str:
        """The activation in the MLP, which has a key of its own."""
        return hf["hidden_activation"]

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Gemma's fields, local layers, norms after the branches, soft caps."""
        own = {
            "post_norms": True,
            "query_scale": float(hf["query_pre_attn_scalar"]) ** -0.5,
            "attention_softcap": float(hf.get("attn_logit_softcapping") or 0),
            "logit_softcap": float(hf.get("final_logit_softcapping") or 0),
        }
        return super().from_hf(hf) | layers_from_hf(hf) | own

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        scale = config.query_scale or config.head_dim**-0.5
        own = {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logit_softcap or None,
        }
        return super().to_hf(config) | layers_to_hf(config) | own


@register
class Gemma3(Gemma2):
    """`Gemma3ForCausalLM`, the text model; local layers have rotary frequencies of their own."""

    model_type = "gemma3_text"
    keys = Gemma2.keys | ConfigKeys(
        irrelevant={
            **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), LAYERS),
            "attn_logit_softcapping": "Gemma 3 in transformers has no cap of its attention",
        }
    )
    name_map = Qwen3.name_map | Gemma2.name_map

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Gemma 2's fields, normalised queries and keys, the local frequencies."""
        ropes = {
            kind: rope_parameters({"rope_parameters": rope})
            for kind, rope in hf["rope_parameters"].items()
        }
        local = rope_from_hf(ropes["sliding_attention"], ("default",))["rope_theta"]
        # Gemma 3 in transformers ignores the attention cap of its configuration.
        own = {"qk_norm": True, "local_rope_theta": local, "attention_softcap": 0.0}
        return super().from_hf({**hf, "rope_parameters": ropes["full_attention"]}) | own

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """Gemma 2's settings with two sets of rotary parameters."""
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        ropes = {"full_attention": rope_to_hf(config), "sliding_attention": local}
        return super().to_hf(config) | {"rope_parameters": ropes}
