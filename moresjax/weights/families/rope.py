"""Rotary embeddings and sliding windows in a `config.json`, which several families share."""

from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError, choice_error
from moresjax.models.decoder import DecoderConfig
from moresjax.models.layers import ROPE_SCALINGS
from moresjax.weights.families.base import HFConfig

# What every rotary setting means here, for heads that are rotated whole or in part.
ROPE_KEYS = ConfigKeys(implemented=("rope_parameters", "rope_scaling", "rope_theta"))
PARTIAL_ROPE_KEYS = ROPE_KEYS | ConfigKeys(implemented=("partial_rotary_factor",))
LAYERS = "layer_types says which layers are local"
LAYER_KEYS = ConfigKeys(
    implemented=("layer_types", "sliding_window"),
    irrelevant=dict.fromkeys(("use_sliding_window", "max_window_layers"), LAYERS),
)
# And what the settings inside `rope_parameters` mean.
ROPE_SETTINGS = ConfigKeys(
    implemented=("rope_type", "rope_theta", "factor"),
    neutral={"partial_rotary_factor": (None, 1.0)},
    irrelevant={
        "type": "rope_type says it",
        "original_max_position_embeddings": "the scalings default and linear do not read it",
    },
)
LLAMA3_ROPE_SETTINGS = ROPE_SETTINGS | ConfigKeys(
    implemented=("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
)

LAYER_TYPES = {"sliding_attention": "l", "full_attention": "g"}


def rope_parameters(hf: HFConfig) -> dict[str, Any]:
    """The rotary settings, from the layout of transformers 5 or 4."""
    rope = dict(hf.get("rope_parameters") or {})
    rope |= {k: x for k, x in (hf.get("rope_scaling") or {}).items() if k != "type"}
    if "rope_type" not in rope:
        rope["rope_type"] = (hf.get("rope_scaling") or {}).get("type", "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is None and hf.get(key) is not None:
            rope[key] = hf[key]
    return rope


def rope_from_hf(
    rope: Mapping[str, Any], supported: Sequence[str] = ROPE_SCALINGS
) -> dict[str, Any]:
    """The fields of `DecoderConfig` for rotary settings.

    Raises:
      UserError: for a scaling that is not among those supported.
    """
    kind = rope["rope_type"]
    if kind not in supported:
        names = ", ".join(supported)
        raise UserError(f"rope scaling {kind!r} is not supported here; choose from: {names}")
    known = LLAMA3_ROPE_SETTINGS if kind == "llama3" else ROPE_SETTINGS
    known.check(rope, f"rope_parameters of kind {kind}")
    fields = {"rope_theta": float(rope.get("rope_theta") or 10_000.0), "rope_scaling": kind}
    if kind != "default":  # which ignores a factor in transformers too
        fields["rope_factor"] = float(rope["factor"])
    if kind == "llama3":
        fields |= {
            "rope_low_turns": float(rope["low_freq_factor"]),
            "rope_high_turns": float(rope["high_freq_factor"]),
            "rope_original_positions": int(rope["original_max_position_embeddings"]),
        }
    return fields


def rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The rotary settings of an LLM, in the layout of transformers 5."""
    rope: dict[str, Any] = {"rope_type": config.rope_scaling, "rope_theta": config.rope_theta}
    if config.rope_scaling != "default":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_turns,
            "high_freq_factor": config.rope_high_turns,
            "original_max_position_embeddings": config.rope_original_positions,
        }
    return rope


def layers_from_hf(hf: HFConfig) -> dict[str, Any]:
    """The sliding window, and the shortest pattern of local and global layers that repeats.

    Raises:
      UserError: for a type of layer that is neither.
    """
    names = hf.get("layer_types") or ["full_attention"] * hf["num_hidden_layers"]
    for name in names:
        if name not in LAYER_TYPES:
            raise choice_error("layer type", name, LAYER_TYPES)
    layers = "".join(LAYER_TYPES[name] for name in names)
    if not hf.get("sliding_window") or "l" not in layers:
        return {}
    prefixes = (layers[:n] for n in range(1, len(layers) + 1))
    pattern = next(p for p in prefixes if (p * len(layers)).startswith(layers))
    return {"window": hf["sliding_window"], "attention_pattern": pattern}


def layers_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The sliding window and the type of every layer; the inverse of `layers_from_hf`."""
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    return {
        "sliding_window": config.window or None,
        "layer_types": [names["l" if local else "g"] for local in config.local_layers],
    }
