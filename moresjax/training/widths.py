"""Runs of different ranks in one program.

The program is that of the largest rank. What a run of a smaller one trains is filled up with zeros
before every step and cut to its size after it, so that all else sees an ordinary run. Methods say
that zeros change nothing (`Method.width`): the results are those of the run's own program, but for
the rounding of sums that have zeros among them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moresjax.models.mllm import MLLM
from moresjax.runs.state import TrainState
from moresjax.training.step import split_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Method
from moresjax.tuning.spec import parse_spec

T = TypeVar("T")


def split_widths(spec: str) -> tuple[tuple[Method, ...], tuple[int, ...]]:
    """The methods of a spec as if all widths were 1, and the widths; 0 for a method without one.

    >>> split_widths("lora:rank=4/ia3") == split_widths("lora:rank=8/ia3")
    False
    >>> split_widths("lora:rank=4/ia3")[0] == split_widths("lora:rank=8/ia3")[0]
    True
    """
    methods = parse_spec(spec)
    narrow = tuple(method.widened(1) if method.width else method for method in methods)
    return narrow, tuple(getattr(m, m.width) if m.width else 0 for m in methods)


def widen(tuning: Tuning, widths: Sequence[int]) -> Tuning:
    """A copy whose methods have other widths; what it trains are shapes only.

    Args:
      tuning: The tuning of a model.
      widths: The width of every method; 0 for one without.
    """
    wide = nnx.clone(tuning)
    pairs = zip(tuning.methods, widths, strict=True)
    wide.methods = tuple((key, m.widened(width) if width else m) for (key, m), width in pairs)
    wide.set_values(jax.eval_shape(wide.initial_values, jax.random.key(0)), nnx.Param)
    return wide


def widen_model(
    graphdef: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    also_train: Sequence[str],
    widths: Sequence[int],
) -> tuple[nnx.GraphDef, nnx.State]:
    """The definition of a split model with larger widths, and the shapes of what it trains."""
    model = nnx.merge(graphdef, trainable, frozen)
    assert isinstance(model, MLLM)  # nothing else has a tuning
    model.tuning = widen(model.tuning, widths)
    wide, shapes, _ = split_model(model, also_train)
    return wide, shapes


def with_room(
    step: Callable[..., Any], narrow: TrainState, wide: TrainState
) -> Callable[..., tuple[TrainState, Any]]:
    """A step of a run's own state by a program of larger widths.

    Args:
      step: `(state, frozen, batch) -> (state, metrics)` with larger widths.
      narrow: The shapes of the run's own state.
      wide: Those of the program's.
    """

    def own(state: TrainState, frozen: nnx.State, batch: Any) -> tuple[TrainState, Any]:
        new, metrics = step(resized(state, wide), frozen, batch)
        return resized(new, narrow), metrics

    return own


def shapes_of(tree: T) -> T:
    """The shapes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def resized(tree: T, like: T) -> T:
    """Arrays with the shapes of others: filled up with zeros, or cut, at the end of their axes."""
    arrays, structure = jax.tree.flatten(tree)
    wanted = [x.shape for x in jax.tree.leaves(like)]
    changed = [n for n, shape in enumerate(wanted) if shape != arrays[n].shape]
    new = _resize([arrays[n] for n in changed], tuple(wanted[n] for n in changed))
    for n, x in zip(changed, new, strict=True):
        arrays[n] = x
    return jax.tree.unflatten(structure, arrays)


@functools.partial(jax.jit, static_argnums=1)
def _resize(arrays: list[Array], shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    def resize(x: Array, shape: tuple[int, ...]) -> Array:
        more = [(0, max(new - old, 0)) for old, new in zip(x.shape, shape, strict=True)]
        return jnp.pad(x, more)[tuple(map(slice, shape))]

    return [resize(x, shape) for x, shape in zip(arrays, shapes, strict=True)]
