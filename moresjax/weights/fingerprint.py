"""What tells models apart: their configuration, and checksums of a few values of parameters."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moresjax.core.parameter_names import first_name, layered_parameters, path_name
from moresjax.core.types import AnyArray
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import WeightDelta
from moresjax.tuning.selectors import parse_layers
from moresjax.tuning.variables import Constant, Lengths, Places

# Fields that say how a model is run, or where it came from, but not what it is.
FREE_FIELDS = ("dtype", "remat", "unroll", "int8", "attention", "model_type")
# Fields of a configuration in version 0.1, and their present names.
RENAMED_FIELDS = {"last_layers": "num_trainable_blocks"}
# Fields that version 0.1 had not; fingerprints leave them out.
NEW_FIELDS = ("model_type",)
# Fields that version 0.2 had not either, with what they have where they change nothing.
NEUTRAL_FIELDS = {"k_bias": True, "feature_norm_eps": 0.0, "image_attention": "causal"}
# A checksum is of this many values, and there is one for this many parameters.
_VALUES, _CHECKSUMS = 64, 8


def fingerprint(mllm: MLLM) -> str:
    """Twelve hexadecimal digits that tell models apart.

    They depend on the configuration (the dtype of computation is part of it), the tuning, a few
    values of every parameter, and every value that a tuning was given rather than learned. They are
    the same whether blocks are stacked or not, and in every version.
    """
    sums = {
        first_name(name): checksum(*(variable.get_value() for variable in layers))
        for name, layers in layered_parameters(mllm).items()
    }
    names = {now: then for then, now in RENAMED_FIELDS.items()}
    parts: list[Any] = [_renamed(mllm.config.to_dict(), names), mllm.tuning.spec, sums]
    if given := _given(mllm.tuning):
        parts.append(given)
    return _short_hash(parts)


def exact_fingerprint(mllm: MLLM) -> str:
    """Twelve hexadecimal digits that also tell neighbouring steps and stored precisions apart.

    They depend on every value of the tuning, and on a few values of each other parameter and the
    dtype in which it is stored, but not on the dtype of computation.
    """
    tuning, others = {}, {}
    for name, variables in layered_parameters(mllm).items():
        layers = [variable.get_value() for variable in variables]
        if name.startswith("tuning."):
            tuning[name] = [_digest(x) for x in layers]
        else:
            others[name] = [str(layers[0].dtype), zlib.crc32(_sample(*layers).tobytes())]
    return _short_hash([tuning, others, _given(mllm.tuning)])


def twin_fingerprint(mllm: MLLM) -> str:
    """Twelve hexadecimal digits that are the same for copies of a model in other precisions.

    They depend on the configuration, the tuning and a few values, as bf16, of each parameter but
    the linears of the LLM's blocks, which a copy may hold in eight bits.
    """
    layers = layered_parameters(mllm)
    linears = {name.removesuffix(".kernel") for name in layers if name.endswith(".kernel")}
    sums = {
        first_name(name): checksum(*(variable.get_value() for variable in own))
        for name, own in layers.items()
        if not (name.startswith("llm.blocks.") and name.rpartition(".")[0] in linears)
    }
    config = _plain(_renamed(mllm.config.to_dict(), {}))
    return _short_hash([config, mllm.tuning.spec, sums, _given(mllm.tuning)])


def precision(mllm: MLLM) -> str:
    """The number format that the LLM's blocks are stored in, and that of activations.

    >>> from moresjax.testing import tiny_model
    >>> precision(tiny_model())
    'float32, float32'
    """
    kernels = (x for name, x in layered_parameters(mllm).items() if name.endswith(".up.kernel"))
    stored = next(iter(kernels))[0].get_value().dtype
    return f"{stored}, {mllm.config.llm.dtype}"


def _short_hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _digest(x: AnyArray) -> str:
    """A hash of all values of an array, its shape and its dtype."""
    array = np.asarray(x)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _given(tuning: Tuning) -> dict[str, Any]:
    """What a tuning holds that its spec does not tell and that is no parameter.

    These are constants such as a steering vector and its strength, shared arrays of an imported
    adapter, and, of several adapters that are held at once, names and layers.
    """
    found: dict[str, Any] = {"adapters": [*tuning.adapters]} if tuning.adapters else {}
    for path, variable in nnx.to_flat_state(nnx.state(tuning, nnx.Any(Constant, Places, Lengths))):
        found[path_name(path)] = _digest(variable.get_value())
    for name, variable in tuning.connector.items():
        found[f"connector.{name}"] = checksum(variable.get_value())
    for key, method in tuning.methods:
        own = method.shared(tuning.config) if isinstance(method, WeightDelta) else {}
        for leaf, x in tuning.common(key).items():
            if not np.array_equal(x, own[leaf]):
                found[f"shared.{key}.{leaf}"] = _digest(x)
        for site, variable in tuning.layer_masks.get(key, {}).items():
            mask = np.asarray(variable.get_value())
            if not np.array_equal(mask, parse_layers(method.layer_choice, len(mask))):
                found[f"layer_masks.{key}.{site}"] = _digest(mask)
    return found


def checksum(*layers: AnyArray) -> int:
    """A checksum of values spread over an array, or over the equal parts of one.

    They are taken as bf16: the result is the same for a base loaded in bf16 or fp32.
    """
    return zlib.crc32(_sample(*layers).astype(jnp.bfloat16).tobytes())


def _sample(*layers: AnyArray) -> np.ndarray:
    """Values spread over an array, or over the equal parts of one."""
    each = layers[0].size
    chosen = np.linspace(0, each * len(layers) - 1, _VALUES).astype(int)
    values = []
    for number, x in enumerate(layers):
        own = chosen[chosen // each == number] - number * each
        values.append(np.asarray(_on_host(x)[np.unravel_index(own, x.shape)]))
    return np.concatenate(values)


def checksums(base: Mapping[str, Sequence[AnyArray]]) -> dict[str, int]:
    """Checksums of a few parameters, spread over the model.

    The linears of blocks are left out: another run may hold them quantised.

    Args:
      base: The values of each parameter: a single array, or one per layer.
    """
    names = sorted(n for n in base if not ("blocks" in n and n.endswith(".kernel")))
    return {name: checksum(*base[name]) for name in names[:: -(-len(names) // _CHECKSUMS) or 1]}


def config_difference(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The first field in which two configurations differ, in words, or nothing.

    Args:
      stored: The configuration that a file of any version holds.
      config: The model's.
    """
    return _difference(_renamed(stored, RENAMED_FIELDS), config)


def _difference(stored: Mapping[str, Any], config: Mapping[str, Any], place: str = "") -> str:
    for name, value in stored.items():
        at = f"{place}.{name}".lstrip(".")
        other = config.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if found := _difference(value, other, at):
                return found
        elif name not in FREE_FIELDS and json.dumps(_plain(value)) != json.dumps(_plain(other)):
            return f"its {at} is {value}, here it is {other}"
    return ""


def _plain(value: Any) -> Any:
    """A value inside a configuration without the fields that make no difference."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items() if key not in FREE_FIELDS}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _renamed(config: Any, names: Mapping[str, str]) -> Any:
    """A configuration, or a value inside of one, with other names for some of its fields."""
    if isinstance(config, Mapping):
        neutral = {key for key, x in NEUTRAL_FIELDS.items() if config.get(key) == x}
        left_out = {*NEW_FIELDS, *neutral}
        kept = {key: value for key, value in config.items() if key not in left_out}
        return {names.get(key, key): _renamed(value, names) for key, value in kept.items()}
    if isinstance(config, list | tuple):
        return [_renamed(value, names) for value in config]
    return config


def _on_host(x: AnyArray) -> AnyArray:
    """The array as one of NumPy's where that takes no copy."""
    if not isinstance(x, jax.Array):
        return x
    here = {device.platform for device in x.devices()} == {"cpu"} and len(x.devices()) == 1
    return np.asarray(x) if here else x
