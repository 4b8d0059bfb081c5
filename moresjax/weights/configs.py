"""Our configuration of a Hugging Face LLM `config.json`, and back, family by family.

Each family is one `Family` in `LLM_FAMILIES`: its name table, and the fields in which it differs
from LLaMA in both directions. Source of the facts: the configuration and modelling files of
transformers 5.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from moresjax.core.errors import UserError, choice_error
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


# Our fields that every family has under a name of its own: ours -> Hugging Face's.
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of `transformers`.

    Attributes:
      table: names of its tensors.
      ours: fields of our configuration, from its own, beyond those common to all.
      theirs: the other way round.
    """

    table: dict[str, str]
    ours: Callable[[Mapping], dict]
    theirs: Callable[[DecoderConfig], dict]


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
    common = {ours: hf[theirs] for ours, theirs in COMMON.items() if hf.get(theirs) is not None}
    return DecoderConfig(**(common | LLM_FAMILIES[family].ours(hf)))


def hf_candidates(config: DecoderConfig) -> Iterator[dict]:
    """For every family, the `config.json` that comes nearest to a decoder.

    At most one of them means the same decoder: `decoder_config` of it tells.
    """
    common = {theirs: getattr(config, ours) for ours, theirs in COMMON.items()}
    for name, family in LLM_FAMILIES.items():
        yield {"model_type": name, **common, **family.theirs(config)}


def hf_activation(name: str) -> str:
    """The name in `transformers` of one of our activation functions."""
    return next(theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == name)


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


# The way back


def _hf_rope(config: DecoderConfig) -> dict:
    rope = {"rope_type": config.rope_scaling, "rope_theta": config.rope_theta}
    if config.rope_scaling != "default":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_turns,
            "high_freq_factor": config.rope_high_turns,
            "original_max_position_embeddings": config.rope_original_positions,
        }
    return rope


def _hf_layers(config: DecoderConfig) -> dict:
    names = {True: "sliding_attention", False: "full_attention"}
    return {
        "sliding_window": config.window or None,
        "layer_types": [names[local] for local in config.local_layers],
    }


def _hf_llama(config: DecoderConfig) -> dict:
    return {
        "rope_parameters": _hf_rope(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": hf_activation(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _hf_mistral(config: DecoderConfig) -> dict:
    return _hf_llama(config) | {"sliding_window": config.window or None}


def _hf_qwen(config: DecoderConfig) -> dict:
    window = {"use_sliding_window": bool(config.window), "max_window_layers": 0}
    return _hf_llama(config) | _hf_layers(config) | window


def _hf_gemma(config: DecoderConfig) -> dict:
    return _hf_llama(config) | {"hidden_activation": hf_activation(config.activation)}


def _hf_gemma2(config: DecoderConfig) -> dict:
    scale = config.query_scale or config.head_dim**-0.5
    return (
        _hf_gemma(config)
        | _hf_layers(config)
        | {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logit_softcap or None,
        }
    )


def _hf_gemma3(config: DecoderConfig) -> dict:
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    both = {"full_attention": _hf_rope(config), "sliding_attention": local}
    return _hf_gemma2(config) | {"rope_parameters": both}


def _hf_partly_rotated(config: DecoderConfig) -> dict:
    return {
        "rope_parameters": _hf_rope(config) | {"partial_rotary_factor": config.rotary_fraction},
        "intermediate_size": config.intermediate_size,
        "hidden_act": hf_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
    }


def _hf_stablelm(config: DecoderConfig) -> dict:
    return _hf_partly_rotated(config) | {
        "use_parallel_residual": config.parallel,
        "use_qkv_bias": config.qkv_bias,
    }


def _hf_opt(config: DecoderConfig) -> dict:
    return {
        "ffn_dim": config.intermediate_size,
        "word_embed_proj_dim": config.hidden_size,
        "activation_function": hf_activation(config.activation),
        "enable_bias": config.qkv_bias,
    }


LLM_FAMILIES = {
    "llama": Family(tables.LLAMA, _llama, _hf_llama),
    "phi": Family(tables.PHI, _phi, _hf_partly_rotated),
    "mistral": Family(tables.LLAMA, _mistral, _hf_mistral),
    "qwen2": Family(tables.LLAMA, _qwen2, _hf_qwen),
    "qwen3": Family(tables.QWEN3, _qwen3, _hf_qwen),
    "gemma": Family(tables.LLAMA, _gemma, _hf_gemma),
    "gemma2": Family(tables.GEMMA2, _gemma2, _hf_gemma2),
    "gemma3_text": Family(tables.GEMMA3, _gemma3, _hf_gemma3),
    "stablelm": Family(tables.STABLELM, _stablelm, _hf_stablelm),
    "opt": Family(tables.OPT, _opt, _hf_opt),
}
LLM_TABLES = {name: family.table for name, family in LLM_FAMILIES.items()}
