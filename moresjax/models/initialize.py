"""Materialises the parameters of an abstract model, which has shapes and no values."""

import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters, path_name
from moresjax.core.types import AnyArray
from moresjax.models.layers import Module
from moresjax.tuning.attach import Tuning


def is_abstract(variable: nnx.Variable) -> bool:
    """Whether a parameter has a shape but no value yet."""
    return isinstance(variable.get_value(), jax.ShapeDtypeStruct)


def set_params(
    model: nnx.Module, arrays: Mapping[str, AnyArray], source: str, part: str = ""
) -> None:
    """Sets the parameters that `arrays` names; others stay as they are.

    Args:
      model: The model; it is changed.
      arrays: Values by parameter name.
      source: What error messages say the values are from.
      part: Sets only parameters below this name; default: all.

    Raises:
      UserError: when an array has another shape than its parameter, or eight bits where the
        parameter has none.
    """
    new, flat = [], dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, variable in flat.items():
        name = path_name(path)
        if name not in arrays or not f"{name}.".startswith(f"{part}." if part else ""):
            continue
        value = jnp.asarray(arrays[name])
        if value.shape != variable.shape:
            raise UserError(
                f"{source}: {name} has shape {value.shape}, the model needs {variable.shape}"
            )
        if value.dtype == jnp.int8 and variable.dtype != jnp.int8:
            raise UserError(f"{source} holds {name} in eight bits; load it with quantize=int8")
        if variable.dtype == jnp.int8 and value.dtype != jnp.int8:
            value, scale = quantize(value)
            factor = (*path[:-1], "scale")
            new.append((factor, flat[factor].replace(scale)))
        new.append((path, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(new))


def abstract_params(model: nnx.Module, part: str = "") -> list[str]:
    """Names of the parameters below `part` that have no value yet."""
    names = [name for name, variable in named_parameters(model).items() if is_abstract(variable)]
    return [name for name in names if not part or name.startswith(f"{part}.")]


def initialize(model: Module, seed: int = 0, part: str = "") -> Module:
    """Gives every parameter without a value its initial value; returns the model.

    Base parameters depend on the seed and their own name only, so a part starts the same whatever
    it is combined with.

    Args:
      model: The model; it is changed.
      seed: Seeds the values.
      part: Only parameters below this name get one; default: all.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    wanted = set(abstract_params(model, part))
    missing = {p: x for p, x in flat if path_name(p) in wanted and p[0] != "tuning"}
    set_params(
        model,
        {
            path_name(p): _start(x, p, seed)
            for p, x in missing.items()
            if "derived" not in x.get_metadata()
        },
        "start",
    )
    tuning = getattr(model, "tuning", None)
    if isinstance(tuning, Tuning) and any(name.startswith("tuning.") for name in wanted):
        tuning.initialize(seed)
    return model


def quantize(kernel: Float[Array, "*L D F"]) -> tuple[Int8[Array, "*L D F"], Float[Array, "*L F"]]:
    """Whole numbers of eight bits and the factor of each output feature: `W ~ whole * factor`."""
    if kernel.ndim == 2:
        return _quantize(kernel)
    # Layer by layer: all of them in fp32 would not fit beside the model.
    whole, factor = zip(*map(_quantize, kernel), strict=True)
    return jnp.stack(whole), jnp.stack(factor)


@jax.jit
def _quantize(kernel: Float[Array, "D F"]) -> tuple[Int8[Array, "D F"], Float[Array, "F"]]:
    kernel = kernel.astype(jnp.float32)
    factor = jnp.abs(kernel).max(0) / 127
    factor = jnp.where(factor > 0, factor, 1.0)
    return jnp.round(kernel / factor).astype(jnp.int8), factor


def _start(variable: nnx.Variable, path: Sequence, seed: int) -> np.ndarray:
    how = variable.get_metadata()
    if "fill" in how:
        return np.full(variable.shape, how["fill"], np.float32)
    rng = np.random.default_rng((seed, zlib.crc32(path_name(path).encode())))
    return how["std"] * rng.standard_normal(variable.shape, np.float32)
