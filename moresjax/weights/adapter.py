"""Our own adapter folder: what a tuning trained, and which base it belongs to.

`tuning.safetensors` holds every trained parameter under its name in the model, of the layers that a
method acts on only. `tuning.json` has the spec string and the base's fingerprint: its
configuration, and checksums of a few values of parameters that did not train.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from moresjax._version import __version__
from moresjax.core.errors import UserError
from moresjax.core.folders import new_file
from moresjax.core.json_files import write_json
from moresjax.core.parameter_names import (
    current_name,
    layered_parameters,
    matches,
    named_parameters,
)
from moresjax.core.reading import read_json
from moresjax.core.types import AnyArray
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import Reserve, stack_adapters, without_adapter
from moresjax.weights import peft, pyreft
from moresjax.weights.acting_layers import entries_of_layers
from moresjax.weights.adapter_files import Description, load_tensors
from moresjax.weights.fingerprint import checksum, checksums, config_difference
from moresjax.weights.rt_modules import import_rt_modules, rt_modules_file

DESCRIPTION, TENSORS = "tuning.json", "tuning.safetensors"
FORMAT = "moresjax-tuning"
ArrayOrShape = AnyArray | jax.ShapeDtypeStruct  # a shape where there is no value yet


def save_adapter(mllm: MLLM, folder: str | Path, *, also_train: Sequence[str] = ()) -> Path:
    """Writes the attached tuning as an adapter folder; returns the folder.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> folder = save_adapter(tiny_model("mores:rank=2"), tempfile.mkdtemp())
    >>> sorted(path.name for path in folder.iterdir())
    ['tuning.json', 'tuning.safetensors']

    Args:
      mllm: The tuned model.
      folder: The folder to write.
      also_train: Paths of other parameters that trained, such as `connector`.

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
        "base": {"config": mllm.config.to_dict(), "checksums": checksums(base)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / TENSORS) as file:
        save_file(arrays | foreign_arrays(tuning), file, metadata={"format": FORMAT})
    write_json(folder / DESCRIPTION, description)
    return folder


def load_adapter(mllm: MLLM, folder: str | Path) -> None:
    """Attaches an adapter folder of moresjax, replacing the attached tuning.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> model = tiny_model()
    >>> load_adapter(model, save_adapter(tiny_model("mores:rank=2"), tempfile.mkdtemp()))
    >>> model.tuning.spec
    'mores:rank=2'

    Raises:
      UserError: when the folder is not an adapter, is damaged, or belongs to another base; the
        model is then as it was.
    """
    tuning, base = _read(mllm, Path(folder))
    mllm.tuning = tuning
    set_params(mllm, base, str(folder))


def attach_adapter(
    mllm: MLLM, folder: str | Path, *, edits: str = "", allow_pickle: bool = False
) -> None:
    """Attaches an adapter: our own folder, one of `peft`, `pyreft`, or the file of MRT's code.

    It replaces the attached tuning.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> from moresjax.weights.peft import export_peft
    >>> model = tiny_model()
    >>> attach_adapter(model, export_peft(tiny_model("ia3"), tempfile.mkdtemp()))
    >>> model.tuning.spec
    'ia3'

    Args:
      mllm: The model.
      folder: The adapter folder, or `rt_modules.bin`.
      edits: What a folder of pyreft and the file of MRT do not say: methods and their tokens, such
        as `mores:positions=image`; see `import_pyreft` and `import_rt_modules`.
      allow_pickle: Whether the pickles of pyreft and of MRT may be read.

    Raises:
      UserError: when the folder is none of these, does not belong to the model, or says itself
        what `edits` says.
    """
    folder = Path(folder)
    if file := rt_modules_file(folder):
        import_rt_modules(file, mllm, edits=edits, allow_pickle=allow_pickle)
        return
    if pyreft.pyreft_folder(folder):
        pyreft.import_pyreft(folder, mllm, edits=edits, allow_pickle=allow_pickle)
        return
    if edits:
        raise UserError(f"{folder} is not a folder of pyreft; it says itself which edits it holds")
    if (folder / peft.CONFIG).is_file():
        peft.import_peft(folder, mllm)
    else:
        load_adapter(mllm, folder)


def leaves_tokens_open(folder: Path) -> bool:
    """Whether an adapter does not say which tokens its edits change."""
    return bool(pyreft.pyreft_folder(folder) or rt_modules_file(folder))


def load_adapters(
    mllm: MLLM,
    folders: Mapping[str, str | Path],
    *,
    reserve: Reserve = 0,
    edits: str = "",
    allow_pickle: bool = False,
) -> None:
    """Attaches several adapter folders by name, for every row of a batch to choose from.

    Each may be one of moresjax, of `peft` or of `pyreft`. Those that are attached already stay, but
    for those of the same names; a single tuning is replaced.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> folder = save_adapter(tiny_model("mores:rank=2"), tempfile.mkdtemp())
    >>> model = tiny_model()
    >>> load_adapters(model, {"counts": folder, "compares": folder})
    >>> model.tuning.adapters
    ('counts', 'compares')

    Args:
      mllm: The model.
      folders: Adapter folders by name.
      reserve: The room for adapters to come; see `stack_adapters`.
      edits: What folders of pyreft do not say; see `attach_adapter`.
      allow_pickle: Whether the pickles of pyreft folders may be read.

    Raises:
      UserError: when a folder is not an adapter of this base, one changes parameters of the base
        other than the connector's, or a method cannot be chosen per row; the model is then as it
        was.
    """
    of_pyreft = {name for name, folder in folders.items() if leaves_tokens_open(Path(folder))}
    if edits and not of_pyreft:
        raise UserError(f"none of {', '.join(map(str, folders.values()))} is a folder of pyreft")
    tunings, connectors = {}, {}
    for name, folder in folders.items():
        own = edits if name in of_pyreft else ""
        tuning, changed = _read_any(mllm, Path(folder), own, allow_pickle)
        prefix = "connector."
        if other := next((n for n in changed if not n.startswith(prefix)), ""):
            raise UserError(
                f"adapter {name!r} has its own {other}; rows of a batch may have their own tuning "
                "and connector, but they share the rest of the model: load it alone"
            )
        tunings[name] = tuning
        if changed:
            base = _base_values(mllm)
            connectors[name] = {
                n.removeprefix(prefix): np.asarray(changed.get(n, x))
                for n, x in base.items()
                if n.startswith(prefix)
            }
    add_tunings(mllm, tunings, connectors, reserve=reserve)


def add_tunings(
    mllm: MLLM,
    tunings: Mapping[str, Tuning],
    connectors: Mapping[str, Mapping[str, AnyArray]] | None = None,
    *,
    reserve: Reserve = 0,
) -> None:
    """Attaches several tunings by name, beside those that are held; see `load_adapters`.

    Args:
      mllm: The model.
      tunings: The tunings by name.
      connectors: The connectors of those that have their own: parameters by their names in it.
      reserve: The room for adapters to come; see `stack_adapters`.
    """
    prefix, values = "connector.", _base_values(mllm).items()
    mllm.tuning = stack_adapters(
        tunings,
        connectors,
        config=mllm.config,
        base_connector={n.removeprefix(prefix): x for n, x in values if n.startswith(prefix)},
        reserve=reserve,
        beside=mllm.tuning,
    )


def unload_adapter(mllm: MLLM, name: str) -> None:
    """Detaches one of several adapters; its room stays.

    Raises:
      UserError: There is no such adapter.
    """
    mllm.tuning = without_adapter(mllm.tuning, name)


def _read_any(
    mllm: MLLM, folder: Path, edits: str, allow_pickle: bool
) -> tuple[Tuning, dict[str, AnyArray]]:
    """The tuning of an adapter folder of any kind, and what it changes of the base."""
    other = leaves_tokens_open(folder) or (folder / peft.CONFIG).is_file()
    if not other:
        tuning, own = _read(mllm, folder)
        base = {name: layers for name, layers in layered_parameters(mllm).items() if name in own}
        values = {
            name: np.stack([np.asarray(x.get_value()) for x in layers])
            if len(layers) > 1
            else layers[0].get_value()
            for name, layers in base.items()
        }
        return tuning, {n: x for n, x in own.items() if not np.array_equal(x, values[n])}
    copy = nnx.clone(mllm)
    copy.llm.restack()
    values = _base_values(copy)
    attach_adapter(copy, folder, edits=edits, allow_pickle=allow_pickle)
    changed = {
        name: x
        for name, x in _base_values(copy).items()
        if x is not values[name] and not np.array_equal(x, values[name])
    }
    return copy.tuning, changed


def _base_values(mllm: MLLM) -> dict[str, AnyArray]:
    """The parameters outside of the tuning, by name."""
    named = named_parameters(mllm).items()
    return {name: x.get_value() for name, x in named if not name.startswith("tuning.")}


def _read(mllm: MLLM, folder: Path) -> tuple[Tuning, dict[str, AnyArray]]:
    """The tuning in a folder, and its values of the base's own parameters."""
    for file in (DESCRIPTION, TENSORS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not an adapter folder: it has no {file}")
    description = read_json(folder / DESCRIPTION, Description)
    arrays = {current_name(name): x for name, x in load_tensors(folder / TENSORS).items()}
    stored_config = description["base"]["config"]
    if difference := config_difference(stored_config, mllm.config.to_dict()):
        raise UserError(f"{folder} belongs to another base: {difference}")
    tuning = Tuning(description["spec"], mllm.config)
    base, trained = _split(mllm, description["also_train"], tuning)
    for name, expected in description["base"]["checksums"].items():
        if name not in base or checksum(*base[name]) != expected:
            raise UserError(f"{folder} belongs to another base: its {name} has other values")
    for name in _shared(tuning):
        if name in arrays:
            _, _, key, leaf = name.split(".")
            values, needed = arrays.pop(name), tuning.shared[key][leaf].shape
            if values.shape != needed:
                raise UserError(_other_shape(folder, name, values, needed))
            tuning.shared[key][leaf][...] = jnp.asarray(values)
    if wrong := sorted(set(trained) ^ set(arrays)):
        raise UserError(f"{folder} lacks or should not hold: {', '.join(wrong[:8])}")
    layers, values = _layers(tuning), {}
    for name, x in arrays.items():
        acts, shape = layers.get(_site(name)), trained[name].shape
        needed = shape if acts is None else (int(acts.sum()), *shape[1:])
        if x.shape != needed:
            raise UserError(_other_shape(folder, name, x, needed))
        values[name] = x if acts is None else x[entries_of_layers(acts)]
    prefix = "tuning."
    own = {n.removeprefix(prefix): x for n, x in values.items() if n.startswith(prefix)}
    set_params(tuning, own, str(folder))
    return tuning, {n: x for n, x in values.items() if not n.startswith(prefix)}


def _other_shape(folder: Path, name: str, values: AnyArray, needed: tuple[int, ...]) -> str:
    return f"{folder}: {name} has shape {values.shape}, the model needs {needed}"


def _split(
    mllm: MLLM, also_train: Sequence[str], tuning: Tuning | None = None
) -> tuple[dict[str, list[AnyArray]], dict[str, ArrayOrShape]]:
    """Parameters that stay and that train, with the attached tuning or with another one.

    Those that stay have a list of one array, or of one per layer where the model holds its blocks
    one by one; those that train are stacked.

    Args:
      mllm: The model.
      also_train: Paths of parameters outside the tuning that train.
      tuning: The tuning, which may have shapes only; default: the attached one.
    """
    tuning = mllm.tuning if tuning is None else tuning
    layered = layered_parameters(mllm).items()
    own = {name: layers for name, layers in layered if not name.startswith("tuning.")}
    own |= {f"tuning.{name}": [x] for name, x in named_parameters(tuning).items()}
    patterns = (*also_train, *tuning.trains)
    base, trained = {}, {}
    for name, layers in own.items():
        values = [variable.get_value() for variable in layers]
        if any(matches(name, pattern) for pattern in patterns):
            trained[name] = values[0] if len(values) == 1 else np.stack(values)
        else:
            base[name] = values
    return base, trained


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


def foreign_arrays(tuning: Tuning) -> dict[str, np.ndarray]:
    """Shared arrays that are not those the spec makes: they came with an imported adapter."""
    own = _shared(Tuning(tuning.spec, tuning.config))
    return {n: x for n, x in _shared(tuning).items() if not np.array_equal(x, own[n])}
