"""Our own adapter folder: what a tuning trained, and which base it belongs to.

`tuning.safetensors` holds every trained parameter under its name in the model, of the layers that a
method acts on only. `tuning.json` has the spec string and the base's fingerprint: its
configuration, and checksums of a few values of parameters that did not train.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from moresjax._version import __version__
from moresjax.core.errors import UserError
from moresjax.core.parameter_names import current_name, first_name, matches, path_name
from moresjax.core.types import AnyArray
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import stack_adapters
from moresjax.weights import peft

DESCRIPTION, TENSORS = "tuning.json", "tuning.safetensors"
FORMAT = "moresjax-tuning"
# How a base is run, not what it is.
_FREE = ("dtype", "remat", "unroll", "int8", "attention")
# Fields of a base's configuration in version 0.1, and their present names.
_RENAMED_FIELDS = {"last_layers": "num_trainable_blocks"}
# A checksum is of this many values, and there is one for this many parameters.
_VALUES, _CHECKSUMS = 64, 8
MaybeArray = AnyArray | jax.ShapeDtypeStruct  # a shape where there is no value yet


def save_adapter(mllm: MLLM, folder: str | Path, *, also_train: Sequence[str] = ()) -> Path:
    """Writes the attached tuning as an adapter folder; returns the folder.

    Args:
      mllm: the tuned model.
      folder: where to.
      also_train: paths of other parameters that trained, such as `connector`.

    Raises:
      UserError: when nothing trained.
    """
    folder, tuning = Path(folder), mllm.tuning
    tuning.check_single("an adapter folder")
    base, trained = _split(mllm, also_train)
    if not trained:
        raise UserError(f"tuning {tuning.spec!r} has no parameters to save")
    layers = _layers(tuning)
    arrays = {name: np.asarray(x)[layers.get(_site(name), ...)] for name, x in trained.items()}
    description = {
        "format": FORMAT,
        "version": __version__,
        "spec": tuning.spec,
        "sites": {key: [*sites] for key, sites in tuning.params.items()},
        "also_train": [*also_train],
        "parameters": sum(x.size for x in arrays.values()),
        "base": {"config": mllm.config.to_dict(), "checksums": _checksums(base)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays | _foreign(tuning), folder / TENSORS, metadata={"format": FORMAT})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def load_adapter(mllm: MLLM, folder: str | Path) -> None:
    """Attaches an adapter folder, replacing the attached tuning.

    Raises:
      UserError: when the folder is not an adapter, is damaged, or belongs to another base; the
        model is then as it was.
    """
    tuning, base = _read(mllm, Path(folder))
    mllm.tuning = tuning
    set_params(mllm, base, str(folder))


def attach_adapter(mllm: MLLM, folder: str | Path) -> None:
    """Attaches an adapter folder, our own or one of `peft`, replacing the attached tuning.

    Raises:
      UserError: when the folder is neither, or does not belong to the model.
    """
    if (Path(folder) / peft.CONFIG).is_file():
        peft.import_peft(folder, mllm)
    else:
        load_adapter(mllm, folder)


def load_adapters(mllm: MLLM, folders: Mapping[str, str | Path]) -> None:
    """Attaches several adapter folders by name, for every row of a batch to choose from.

    Raises:
      UserError: when a folder is not an adapter of this base, one changes parameters of the base
        itself, or they cannot be held together (see `stack_adapters`); the
        model is then as it was.
    """
    tunings = {}
    values = {path_name(p): x.get_value() for p, x in nnx.to_flat_state(nnx.state(mllm, nnx.Param))}
    for name, folder in folders.items():
        tunings[name], base = _read(mllm, Path(folder))
        for changed, x in base.items():
            if not np.array_equal(x, values[changed]):
                raise UserError(
                    f"adapter {name!r} has its own {changed}, which all rows of a batch share; "
                    "load the adapters on a model with these values"
                )
    mllm.tuning = stack_adapters(tunings)


def fingerprint(mllm: MLLM) -> str:
    """Twelve hexadecimal digits that tell models apart: by configuration, tuning, and a few values
    of every parameter. They are the same whether blocks are stacked or not, in every version."""
    parts: dict[str, dict[int, AnyArray]] = {}
    for path, x in nnx.to_flat_state(nnx.state(mllm, nnx.Param)):
        layer = 0
        if path[:2] == ("llm", "blocks") and isinstance(path[2], int):
            layer, path = path[2], (*path[:2], *path[3:])
        parts.setdefault(path_name(path), {})[layer] = x.get_value()
    sums = {
        first_name(name): _checksum(*(own[i] for i in sorted(own))) for name, own in parts.items()
    }
    first_fields = {now: then for then, now in _RENAMED_FIELDS.items()}
    config = _renamed(mllm.config.to_dict(), first_fields)
    text = json.dumps([config, mllm.tuning.spec, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(mllm: MLLM, folder: Path) -> tuple[Tuning, dict[str, AnyArray]]:
    """The tuning in a folder, and its values of the base's own parameters."""
    for file in (DESCRIPTION, TENSORS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not an adapter folder: it has no {file}")
    description = json.loads((folder / DESCRIPTION).read_text())
    arrays = {current_name(name): x for name, x in load_file(folder / TENSORS).items()}
    base_config = _renamed(description["base"]["config"], _RENAMED_FIELDS)
    if difference := _difference(base_config, mllm.config.to_dict()):
        raise UserError(f"{folder} belongs to another base: {difference}")
    tuning = Tuning(description["spec"], mllm.config)
    base, expected = _split(mllm, description["also_train"], tuning)
    for name, checksum in description["base"]["checksums"].items():
        if name not in base or _checksum(base[name]) != checksum:
            raise UserError(f"{folder} belongs to another base: its {name} has other values")
    for name in _shared(tuning):
        if name in arrays:
            _, _, key, leaf = name.split(".")
            tuning.shared[key][leaf][...] = jnp.asarray(arrays.pop(name))
    if wrong := sorted(set(expected) ^ set(arrays)):
        raise UserError(f"{folder} lacks or should not hold: {', '.join(wrong[:8])}")
    layers = _layers(tuning)
    for name, x in arrays.items():
        acts, shape = layers.get(_site(name)), expected[name].shape
        needed = shape if acts is None else (int(acts.sum()), *shape[1:])
        if x.shape != needed:
            raise UserError(f"{folder}: {name} has shape {x.shape}, the model needs {needed}")
        # A layer that does not act gets what its neighbour has: parameters like any others.
        expected[name] = x if acts is None else x[np.maximum(np.cumsum(acts) - 1, 0)]
    prefix = "tuning."
    own = {n.removeprefix(prefix): x for n, x in expected.items() if n.startswith(prefix)}
    set_params(tuning, own, str(folder))
    return tuning, {n: x for n, x in expected.items() if not n.startswith(prefix)}


def _split(
    mllm: MLLM, also_train: Sequence[str], tuning: Tuning | None = None
) -> tuple[dict[str, MaybeArray], dict[str, MaybeArray]]:
    """Parameters that stay and that train, with the attached tuning or with another one."""
    tuning = mllm.tuning if tuning is None else tuning
    flat = nnx.to_flat_state(nnx.state(mllm, nnx.Param))
    values = {path_name(path): x.get_value() for path, x in flat if path[0] != "tuning"}
    for path, x in nnx.to_flat_state(nnx.state(tuning, nnx.Param)):
        values[f"tuning.{path_name(path)}"] = x.get_value()
    patterns = (*also_train, *tuning.trains)
    trains = {name for name in values if any(matches(name, p) for p in patterns)}
    base = {name: x for name, x in values.items() if name not in trains}
    return base, {name: values[name] for name in values if name in trains}


def _site(name: str) -> str:
    return name.rpartition(".")[0]


def _layers(tuning: Tuning) -> dict[str, np.ndarray]:
    """Flags of the layers that act, by the site's name in the model."""
    return {
        f"tuning.params.{key}.{site}": np.asarray(layer_mask[...])
        for key, layer_masks in tuning.layer_masks.items()
        for site, layer_mask in layer_masks.items()
    }


def _shared(tuning: Tuning) -> dict[str, np.ndarray]:
    return {
        f"tuning.shared.{key}.{leaf}": np.asarray(x)
        for key in tuning.shared
        for leaf, x in tuning.common(key).items()
    }


def _foreign(tuning: Tuning) -> dict[str, np.ndarray]:
    """Shared arrays that are not those the spec makes: they came with an imported adapter."""
    own = _shared(Tuning(tuning.spec, tuning.config))
    return {n: x for n, x in _shared(tuning).items() if not np.array_equal(x, own[n])}


def _checksums(base: Mapping[str, AnyArray]) -> dict[str, int]:
    """Checksums of a few parameters, spread over the model.

    The linears of blocks are left out: another run may hold them quantised.
    """
    names = sorted(n for n in base if not ("blocks" in n and n.endswith(".kernel")))
    return {name: _checksum(base[name]) for name in names[:: -(-len(names) // _CHECKSUMS) or 1]}


def _checksum(*layers: AnyArray) -> int:
    """Of values spread over an array, or over the equal parts of one, as bf16: the same for a base
    loaded in bf16 or fp32."""
    each = layers[0].size
    chosen = np.linspace(0, each * len(layers) - 1, _VALUES).astype(int)
    values = []
    for number, x in enumerate(layers):
        own = chosen[chosen // each == number] - number * each
        values.append(np.asarray(_on_host(x)[np.unravel_index(own, x.shape)]))
    return zlib.crc32(np.concatenate(values).astype(jnp.bfloat16).tobytes())


def _on_host(x: AnyArray) -> AnyArray:
    """The array as one of NumPy's where that takes no copy."""
    here = isinstance(x, jax.Array) and {device.platform for device in x.devices()} == {"cpu"}
    return np.asarray(x) if here and len(x.devices()) == 1 else x


def _renamed(config: Any, names: Mapping[str, str]) -> Any:
    """A configuration, or a value inside of one, with other names for some of its fields."""
    if isinstance(config, Mapping):
        return {names.get(key, key): _renamed(value, names) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_renamed(value, names) for value in config]
    return config


def _difference(stored: Mapping, ours: Mapping, place: str = "") -> str:
    """The first field in which two configurations differ, or nothing."""
    for name, value in stored.items():
        at = f"{place}.{name}".lstrip(".")
        other = ours.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if found := _difference(value, other, at):
                return found
        elif name not in _FREE and json.dumps(value) != json.dumps(other):
            return f"its {at} is {value}, here it is {other}"
    return ""
