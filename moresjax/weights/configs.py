"""Our configuration of a Hugging Face LLM `config.json`, family by family.

Each family is one entry of `LLM_FAMILIES`: its name table and the fields in which it differs from
LLaMA. Source of the facts: the configuration and modelling files of transformers 5.
"""

from collections.abc import Callable, Mapping

from moresjax.errors import UserError, choice_error
from moresjax.models.decoder import DecoderConfig
from moresjax.models.layers import ROPE_SCALINGS
from moresjax.weights import tables

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(name: str) -> str:
    """Our name of an activation function.

    Raises:
      UserError: for one that is not supported.
    """
    if name not in ACTIVATION_NAMES:
        raise choice_error("activation", name, ACTIVATION_NAMES)
    return ACTIVATION_NAMES[name]


def decoder_config(hf: Mapping) -> DecoderConfig:
    """Our configuration of a Hugging Face LLM `config.json`.

    Raises:
      UserError: for a family, or a variant of one, that is not supported.
    """
    family = hf["model_type"]
    if family not in LLM_FAMILIES:
        raise choice_error("LLM family", family, LLM_FAMILIES)
    _, fields = LLM_FAMILIES[family]
    common = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim") or 0,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "max_positions": hf["max_position_embeddings"],
    }
    return DecoderConfig(**(common | fields(hf)))


def _refuse(hf: Mapping, **unsupported) -> None:
    """Raises a `UserError` when a switch of the configuration has a value we have no code for."""
    for key, value in unsupported.items():
        if hf.get(key) == value:
            raise UserError(f"{hf['model_type']} with {key}={value} is not supported")


# Rotary embedding


def _rope_parameters(hf: Mapping) -> dict:
    """The rotary settings, from the layout of transformers 5 or 4."""
    rope = dict(hf.get("rope_parameters") or {})
    rope |= {k: x for k, x in (hf.get("rope_scaling") or {}).items() if k != "type"}
    if "rope_type" not in rope:
        rope["rope_type"] = (hf.get("rope_scaling") or {}).get("type", "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is None and hf.get(key) is not None:
            rope[key] = hf[key]
    return rope


def _rope(rope: Mapping, supported: tuple[str, ...] = ROPE_SCALINGS) -> dict:
    kind = rope["rope_type"]
    if kind not in supported:
        names = ", ".join(supported)
        raise UserError(f"rope scaling {kind!r} is not supported here; choose from: {names}")
    fields = {"rope_theta": float(rope.get("rope_theta") or 10_000.0), "rope_scaling": kind}
    if kind != "default":
        fields["rope_factor"] = float(rope["factor"])
    if kind == "llama3":
        fields |= {
            "rope_low_turns": float(rope["low_freq_factor"]),
            "rope_high_turns": float(rope["high_freq_factor"]),
            "rope_original_positions": int(rope["original_max_position_embeddings"]),
        }
    return fields


# Local layers


def _attention_pattern(hf: Mapping) -> dict:
    """The sliding window and the shortest pattern of local and global layers that repeats."""
    kinds = {"sliding_attention": "l", "full_attention": "g"}
    names = hf.get("layer_types") or ["full_attention"] * hf["num_hidden_layers"]
    for name in names:
        if name not in kinds:
            raise choice_error("layer type", name, kinds)
    if not hf.get("sliding_window"):
        return {}
    layers = "".join(kinds[name] for name in names)
    for period in range(1, len(layers) + 1):
        if all(kind == layers[i % period] for i, kind in enumerate(layers)):
            pattern = layers[:period]
            return {} if pattern == "g" else _windowed(hf, pattern)


def _windowed(hf: Mapping, pattern: str) -> dict:
    return {"window": hf["sliding_window"], "attention_pattern": pattern}


# Families


def _llama(hf: Mapping) -> dict:
    return {
        **_rope(_rope_parameters(hf)),
        "intermediate_size": hf["intermediate_size"],
        "activation": activation(hf["hidden_act"]),
        "norm_eps": hf["rms_norm_eps"],
        "qkv_bias": hf.get("attention_bias", False),
        "out_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    }


def _mistral(hf: Mapping) -> dict:
    return _llama(hf) | (_windowed(hf, "l") if hf.get("sliding_window") else {})


def _qwen2(hf: Mapping) -> dict:
    return _llama(hf) | _attention_pattern(hf) | {"qkv_bias": True, "out_bias": False}


def _qwen3(hf: Mapping) -> dict:
    return _llama(hf) | _attention_pattern(hf) | {"qk_norm": True}


def _gemma(hf: Mapping) -> dict:
    _refuse(hf, use_bidirectional_attention=True)
    # Old files say "gelu" and mean the approximation.
    name = hf.get("hidden_activation") or hf["hidden_act"]
    name = "gelu_pytorch_tanh" if name == "gelu" else name
    return _llama({**hf, "hidden_act": name}) | {"norm_offset": 1.0, "scale_embeddings": True}


def _gemma2(hf: Mapping) -> dict:
    return (
        _gemma(hf)
        | _attention_pattern(hf)
        | {
            "post_norms": True,
            "query_scale": float(hf["query_pre_attn_scalar"]) ** -0.5,
            "attention_softcap": float(hf.get("attn_logit_softcapping") or 0),
            "logit_softcap": float(hf.get("final_logit_softcapping") or 0),
        }
    )


def _gemma3(hf: Mapping) -> dict:
    whole = hf["rope_parameters"]
    both = {kind: _rope_parameters({"rope_parameters": rope}) for kind, rope in whole.items()}
    local = _rope(both["sliding_attention"], ("default",))["rope_theta"]
    return (
        _gemma2({**hf, "rope_parameters": both["full_attention"]})
        # Gemma 3 in transformers ignores the attention cap of its configuration.
        | {"qk_norm": True, "local_rope_theta": local, "attention_softcap": 0.0}
    )


def _partly_rotated(hf: Mapping, fraction: float, *scalings: str) -> dict:
    """What StableLM and Phi share."""
    _refuse(hf, qk_layernorm=True)
    rope = _rope_parameters(hf)
    return {
        **_rope(rope, scalings),
        "rotary_fraction": float(rope.get("partial_rotary_factor", fraction)),
        "intermediate_size": hf["intermediate_size"],
        "activation": activation(hf["hidden_act"]),
        "norm": "layer",
        "norm_eps": hf["layer_norm_eps"],
    }


def _stablelm(hf: Mapping) -> dict:
    return {
        **_partly_rotated(hf, 0.25, *ROPE_SCALINGS),
        "parallel": hf.get("use_parallel_residual", False),
        "qkv_bias": hf.get("use_qkv_bias", False),
    }


def _phi(hf: Mapping) -> dict:
    return {
        **_partly_rotated(hf, 0.5, "default"),
        "gated_mlp": False,
        "parallel": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    }


def _opt(hf: Mapping) -> dict:
    _refuse(
        hf,
        do_layer_norm_before=False,
        _remove_final_layer_norm=True,
        layer_norm_elementwise_affine=False,
    )
    width = hf.get("word_embed_proj_dim") or hf["hidden_size"]
    if width != hf["hidden_size"]:
        raise UserError(
            f"opt with word_embed_proj_dim={width}, which is not hidden_size={hf['hidden_size']}, "
            "is not supported"
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


# model_type -> (name table, fields that are not common to all)
LLM_FAMILIES: dict[str, tuple[dict[str, str], Callable[[Mapping], dict]]] = {
    "llama": (tables.LLAMA, _llama),
    "phi": (tables.PHI, _phi),
    "mistral": (tables.LLAMA, _mistral),
    "qwen2": (tables.LLAMA, _qwen2),
    "qwen3": (tables.QWEN3, _qwen3),
    "gemma": (tables.LLAMA, _gemma),
    "gemma2": (tables.GEMMA2, _gemma2),
    "gemma3_text": (tables.GEMMA3, _gemma3),
    "stablelm": (tables.STABLELM, _stablelm),
    "opt": (tables.OPT, _opt),
}
LLM_TABLES = {family: table for family, (table, _) in LLM_FAMILIES.items()}
