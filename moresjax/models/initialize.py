"""Values for the parameters that a model only describes."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moresjax.errors import UserError
from moresjax.paths import path_name


def is_described(variable: nnx.Variable) -> bool:
    """Whether a parameter has a shape but no value yet."""
    return isinstance(variable.get_value(), jax.ShapeDtypeStruct)


def fill(model: nnx.Module, arrays: Mapping[str, jax.Array], source: str, part: str = "") -> None:
    """Sets the parameters below `part` (default: all) that `arrays` names; others stay as they are.

    Raises:
      UserError: when an array has another shape than its parameter.
    """
    new = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = path_name(path)
        if name not in arrays or not f"{name}.".startswith(f"{part}." if part else ""):
            continue
        value = jnp.asarray(arrays[name])
        if value.shape != variable.shape:
            raise UserError(
                f"{source}: {name} has shape {value.shape}, the model needs {variable.shape}"
            )
        new.append((path, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(new))


def described(model: nnx.Module, part: str = "") -> list[str]:
    """Names of the parameters below `part` that have no value yet."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = [path_name(path) for path, variable in flat if is_described(variable)]
    return [name for name in names if not part or name.startswith(f"{part}.")]


def initialize(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Gives every parameter without a value its start value; returns the model.

    Base parameters depend on the seed and their own name only, so a part starts the same whatever
    it is combined with.
    """
    new = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if is_described(variable) and path[0] != "tuning":
            new.append((path, variable.replace(jnp.asarray(_start(variable, path, seed)))))
    nnx.update(model, nnx.from_flat_state(new))
    if described(model, "tuning"):
        model.tuning.initialize(seed)
    return model


def _start(variable: nnx.Variable, path, seed: int) -> np.ndarray:
    how = variable.get_metadata()
    if "fill" in how:
        return np.full(variable.shape, how["fill"], np.float32)
    rng = np.random.default_rng((seed, zlib.crc32(path_name(path).encode())))
    return how["std"] * rng.standard_normal(variable.shape, np.float32)
