"""Methods as they act at one site in one pass.

Axis legend: B rows, S tokens, D hidden size, K key heads, H head size, P virtual tokens,
F features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.tuning.base import Edit, LinearLike, Params, VirtualTokens, WeightDelta


@dataclasses.dataclass(frozen=True)
class AttachedEdit:
    """An edit at one site.

    At layered sites, `layer_mask` and every leaf of `params` have a leading layer axis. With
    several adapters the next axis counts these.

    Attributes:
      method: the edit.
      params: its parameters, which have been through `prepare`.
      mask: the selected tokens `[B, S]`.
      layer_mask: whether the layer is edited; None at a site outside the blocks.
      rows: the place of each row's piece; None for a single tuning.
    """

    method: Edit
    params: Params
    mask: Array
    layer_mask: Array | None = None
    rows: Int[Array, " B"] | None = None

    def apply(
        self,
        params: Params,
        layer_mask: Array | None,
        h: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        """The edited activations of the layer that `params` and `layer_mask` belong to."""
        delta = by_row(self.method.delta, params, h, self.rows)
        if self.rows is not None and layer_mask is not None:
            layer_mask = layer_mask[self.rows][:, None]
        if key is not None and self.method.dropout:
            delta = self.method.drop(key, delta, h)
        mask = self.mask if layer_mask is None else self.mask & layer_mask
        return h + jnp.where(mask[..., None], delta, 0).astype(h.dtype)


@dataclasses.dataclass(frozen=True)
class AttachedDelta:
    """A weight delta at the linear that a site names.

    Attributes:
      method: the weight delta.
      params: its parameters, which have been through `prepare`, neutral in layers that it leaves
        alone; a leading layer axis, then one of adapters if there are several.
      common: arrays that it finds among its parameters at every layer.
      rows: the place of each row's piece; None for a single tuning.
    """

    method: WeightDelta
    params: Params
    common: Params = dataclasses.field(default_factory=dict)
    rows: Int[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class AttachedTokens:
    """Virtual tokens at one site; at layered sites the content has a leading layer axis.

    Attributes:
      method: the virtual tokens.
      params: their content; the next axis counts places where rows have their own.
      rows: the place of each row; None for a single tuning.
    """

    method: VirtualTokens
    params: Params
    rows: Int[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class AttachedWrite:
    """What replaces the activations at one site, after all edits, in one pass.

    Attributes:
      write: `write(params, h)` gives what the activations are to be.
      params: arrays; at layered sites with a leading layer axis.
    """

    write: Callable[[Params, Array], Array]
    params: Params

    def apply(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The activations of the layer that `params` belong to."""
        return self.write(params, h).astype(h.dtype)


Attached = AttachedEdit | AttachedDelta | AttachedTokens | AttachedWrite


def by_row(function: Callable, params: Any, x: Array, rows: Array | None) -> Array:
    """`function(params, x)`, or the same with each row's own parameters."""
    if rows is None:
        return function(params, x)
    own = jax.tree.map(lambda leaf: leaf[rows], params)
    return jax.vmap(lambda params, row: function(params, row[None])[0])(own, x)


def put_before(
    content: Float[Array, "*C P F"], x: Float[Array, "B K S H"], rows: Int[Array, " B"] | None
) -> Float[Array, "B K T H"]:
    """Puts learned keys, or values, before those of every row: the same, or its own."""
    batch, heads, _, dim = x.shape
    content = content if rows is None else content[rows]
    content = content.reshape(*content.shape[:-1], heads, dim).swapaxes(-3, -2).astype(x.dtype)
    return jnp.concatenate([jnp.broadcast_to(content, (batch, *content.shape[-3:])), x], axis=2)


@dataclasses.dataclass(frozen=True)
class _TunedLinear:
    """A linear seen through a weight delta."""

    method: WeightDelta
    params: Params
    linear: LinearLike
    key: PRNGKeyArray | None

    @property
    def bias(self) -> nnx.Variable | None:
        return self.linear.bias

    def dense(self) -> Float[Array, "D F"]:
        return self.linear.dense()

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        return self.method.apply(self.params, self.linear, x, self.key)


# A weight delta as it is attached, its parameters, and the key of its dropout.
Tuned = tuple[AttachedDelta, Params, PRNGKeyArray | None]


def tuned_linear(
    linear: LinearLike, deltas: Sequence[Tuned], x: Float[Array, "B S D"]
) -> Float[Array, "B S F"]:
    """The output of a linear seen through weight deltas, the first one next to it."""

    def whole(each_params: Sequence[Params], x: Array) -> Array:
        seen = linear
        for params, (item, _, key) in zip(each_params, deltas, strict=True):
            seen = _TunedLinear(item.method, params | item.common, seen, key)
        return seen(x)

    each = [params for _, params, _ in deltas]
    if deltas[0][0].rows is None:
        return whole(each, x)
    own = [jax.tree.map(lambda leaf, i=item.rows: leaf[i], params) for item, params, _ in deltas]
    return jax.vmap(lambda params, row: whole(params, row[None])[0])(own, x)
