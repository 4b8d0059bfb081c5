"""A tuning that goes on from an earlier run or from an adapter folder: `init.tuning`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moresjax.core.errors import UserError
from moresjax.core.folders import new_file
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.core.plugins import explain_missing
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.runs.config import read_config
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.paths import is_workdir
from moresjax.tuning.attach import Tuning
from moresjax.weights.adapter import attach_adapter, foreign_arrays, leaves_tokens_open
from moresjax.weights.adapter_files import load_tensors

OWN = "tuning."
# Frozen arrays of a tuning, in the directory of a run that got them from an adapter.
SHARED = "tuning_shared.safetensors"


def load_tuning(model: MLLM, source: Path, *, allow_pickle: bool = False) -> None:
    """Gives the attached tuning the trained values of a run or of an adapter folder.

    Base parameters that the tuning trained, such as norms or a whole LLM, come with it; an adapter
    folder also brings a connector that it holds.

    Args:
      model: The model with its base parameters, changed in place.
      source: A run's directory, or an adapter of moresjax, `peft`, `pyreft` or MRT's code.
      allow_pickle: Whether the pickles of pyreft and MRT may be read.

    Raises:
      UserError: when the source is neither, or its tuning is another one.
    """
    wanted = model.tuning
    if is_workdir(source):
        found = _tuning_of_run(model, source)
    else:
        edits = wanted.spec if leaves_tokens_open(source) else ""
        attach_adapter(model, source, edits=edits, allow_pickle=allow_pickle)
        found, model.tuning = model.tuning, wanted
    if not _same(wanted, found):
        raise UserError(
            f"init.tuning: {source} holds {found.spec}, this run's tuning is {wanted.spec}; they "
            "may differ in init and dropout only"
        )
    values = {name: variable.get_value() for name, variable in named_parameters(found).items()}
    set_params(wanted, values, str(source))
    for key, arrays in found.shared.items():
        for leaf, x in arrays.items():
            wanted.shared[key][leaf][...] = x[...]


def save_shared(tuning: Tuning, workdir: Path) -> None:
    """Writes the frozen arrays of a tuning that came with an adapter, if there are any.

    A checkpoint holds what trains only, and the spec makes other ones.
    """
    if list(tuning.shared) and (arrays := foreign_arrays(tuning)):
        with new_file(workdir / SHARED) as file:
            save_file(arrays, file)


def load_shared(tuning: Tuning, workdir: Path) -> None:
    """Gives a run's tuning the frozen arrays that `save_shared` has written."""
    arrays = load_tensors(workdir / SHARED) if (workdir / SHARED).is_file() else {}
    for name, x in arrays.items():
        *_, key, leaf = name.split(".")
        tuning.shared[key][leaf][...] = jnp.asarray(x)


def _tuning_of_run(model: MLLM, workdir: Path) -> Tuning:
    """The tuning of a run; what else the tuning trained is set in the model."""
    config, trained = read_config(workdir / "config.json"), trained_parameters(workdir)
    with explain_missing(config.plugins, str(workdir)):
        found = Tuning(config.tuning, model.config)
    found.initialize()
    load_shared(found, workdir)
    own = {name.removeprefix(OWN): x for name, x in trained.items() if name.startswith(OWN)}
    if missing := sorted(set(named_parameters(found)) - set(own)):
        raise UserError(f"init.tuning: {workdir} holds no weights for tuning.{missing[0]}")
    set_params(found, own, str(workdir))
    base = [pattern for pattern in found.trains if not pattern.startswith(OWN)]
    brought = {n: x for n, x in trained.items() if any(matches(n, pattern) for pattern in base)}
    set_params(model, brought, str(workdir))
    return found


def _same(one: Tuning, other: Tuning) -> bool:
    """Whether two tunings compute the same with the same parameters."""
    if [(k, m.trained) for k, m in one.methods] != [(k, m.trained) for k, m in other.methods]:
        return False
    return all(
        np.array_equal(mask[...], other.layer_masks[key][site][...])
        for key, masks in one.layer_masks.items()
        for site, mask in masks.items()
    )
