"""What attached methods and probes do during one forward pass.

Axis legend: B rows, S tokens, D hidden size, K key heads, H head size, P virtual tokens.

The models call `linear` and `edit` at their sites; with nothing attached these are the plain linear
and the identity. What `edit` returns is shown to the probes of the site, and what a linear X of a
block reads to those of `X.in`. Sites are named
`vision.block.X`, `connector.N` (its linear number N), `connector.out`, `llm.embed.out`,
`llm.norm.out` and `llm.block.X`, X being a linear (`q k v o gate up down`) or `attn.out`,
`mlp.out`, `out`. Virtual tokens are at `vision.embed`, `llm.embed`, `X.block.in` and
`llm.block.kv`.

`Hooks` serve a whole forward pass, `TowerHooks` the blocks of the LLM or of the vision encoder,
`LayerHooks` one of these blocks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moresjax.core.ops import pick
from moresjax.core.types import AnyArray
from moresjax.tuning.base import (
    Edit,
    LinearLike,
    Params,
    Probe,
    ProbeContext,
    VirtualTokens,
    WeightDelta,
    probe_layers,
    reads_attention,
)

TOWERS = ("vision", "llm")
# Where virtual tokens are tokens, inside a tower.
TOKEN_SITES = ("embed", "in")


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
      rows: the adapter of each row; None for a single tuning.
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
        delta = _by_row(self.method.delta, params, h, self.rows)
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
      rows: the adapter of each row; None for a single tuning.
    """

    method: WeightDelta
    params: Params
    common: Params = dataclasses.field(default_factory=dict)
    rows: Int[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class AttachedTokens:
    """Virtual tokens at one site; at layered sites the content has a leading layer axis."""

    method: VirtualTokens
    params: Params


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
# Parameters and layer mask of one method in one layer, or stacked over layers.
LayerParams = tuple[Params, Array | None]


def _by_row(function: Callable, params: Any, x: Array, rows: Array | None) -> Array:
    """`function(params, x)`, or the same with each row's own parameters."""
    if rows is None:
        return function(params, x)
    own = jax.tree.map(lambda leaf: leaf[rows], params)
    return jax.vmap(lambda params, row: function(params, row[None])[0])(own, x)


def _put_before(rows: Float[Array, "P F"], x: Float[Array, "B K S H"]) -> Float[Array, "B K T H"]:
    """Puts the same learned keys, or values, before those of every row."""
    batch, heads, _, dim = x.shape
    rows = rows.reshape(-1, heads, dim).swapaxes(0, 1).astype(x.dtype)
    return jnp.concatenate([jnp.broadcast_to(rows, (batch, *rows.shape)), x], axis=2)


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


# A weight delta, its parameters, those that adapters share, and the key of its dropout.
Tuned = tuple[WeightDelta, Params, Params, PRNGKeyArray | None]


def _tuned(
    linear: LinearLike, deltas: Sequence[Tuned], x: Float[Array, "B S D"], rows: Array | None
) -> Float[Array, "B S F"]:
    """The output of a linear seen through weight deltas, the first one next to it."""

    def whole(each_params: Sequence[Params], x: Array) -> Array:
        seen = linear
        for params, (method, _, common, key) in zip(each_params, deltas, strict=True):
            seen = _TunedLinear(method, params | common, seen, key)
        return seen(x)

    return _by_row(whole, [params for _, params, _, _ in deltas], x, rows)


class LayerHooks:
    """The hooks of one layer. `stats` collects what the probes read."""

    def __init__(
        self, tower: "TowerHooks", layer_params: Sequence[LayerParams], layer: int | Array
    ) -> None:
        self._tower, self._params, self._layer = tower, layer_params, layer
        self.stats: dict[str, Any] = {}

    def _key(self, number: int) -> PRNGKeyArray | None:
        """The key of a method's dropout in this layer."""
        if self._tower.key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._tower.key, self._layer), number)

    def at(self, queries: Int[Array, "B Q"]) -> "LayerHooks":
        """The hooks of some tokens of every row; they add to the same statistics."""
        part = LayerHooks(self._tower.of(queries), self._params, self._layer)
        part.stats = self.stats
        return part

    def linear(
        self, name: str, linear: LinearLike, x: Float[Array, "B S D"]
    ) -> Float[Array, "B S F"]:
        """The output of a linear, with the weight deltas that are attached to it."""
        self._read(self._tower.context, f"{name}.in", h=x)
        items = [(n, i) for n, i in self._tower.at(name) if isinstance(i, AttachedDelta)]
        if not items:
            return linear(x)

        deltas = [
            (item.method, self._params[number][0], item.common, self._key(number))
            for number, item in items
        ]
        return _tuned(linear, deltas, x, items[0][1].rows)

    def edit(self, name: str, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The output of a branch or block after the edits that are attached to it."""
        for number, item in self._tower.at(name):
            if isinstance(item, AttachedEdit):
                h = item.apply(*self._params[number], h, self._key(number))
            elif isinstance(item, AttachedWrite):
                h = item.apply(self._params[number][0], h)
        self._read(self._tower.context, name, h=h)
        return h

    def enter(self, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The input of the block: extra tokens that have content at this layer get it."""
        for number, _ in self._tower.at("in"):
            h = self._tower.write(number, self._params[number][0], h)
        return h

    def extend(
        self, k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Keys (after rotation) and values, with the learned ones before them."""
        for number, _ in reversed(self._tower.at("kv")):
            params, _ = self._params[number]
            k, v = _put_before(params["k"], k), _put_before(params["v"], v)
        return k, v

    def read_attention(
        self,
        q: Float[Array, "B N S H"],
        k: Float[Array, "B K T H"],
        mask: Bool[Array, "B S T"] | None,
        softcap: float,
    ) -> None:
        """Shows queries and keys to the probes, as `attn`.

        Args:
          q: The queries.
          k: The keys.
          mask: What this layer's queries see, when that differs between layers; else None.
          softcap: The soft cap on the layer's attention logits.
        """
        context = self._tower.context
        if context is None or not any(map(reads_attention, self._tower.probes)):
            return
        context = dataclasses.replace(context, softcap=softcap)
        if mask is not None:
            if context.queries is not None:
                mask = jnp.take_along_axis(mask, context.queries[:, :, None], axis=1)
            context = dataclasses.replace(context, mask=mask)
        self._read(context, "attn", q=q, k=k)

    def _read(self, context: ProbeContext | None, name: str, **tensors: Array) -> None:
        """Shows tensors to the probes of a site; in a scan, whatever layers they choose."""
        for probe in self._tower.probes:
            layers = probe_layers(probe)
            if layers is not None and isinstance(self._layer, int) and self._layer not in layers:
                continue
            if probe.site in (name, f"{self._tower.name}.block.{name}"):
                self.stats[probe.name] = probe.read(context, **tensors)


class TowerHooks:
    """The hooks of all layers of one tower. `stacked` is scanned beside the blocks."""

    def __init__(
        self,
        items: Sequence[tuple[str, Attached]] = (),
        key: PRNGKeyArray | None = None,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
        name: str = "llm",
        stats: dict[str, Any] | None = None,
    ) -> None:
        self._items = list(items)
        self.key, self.probes, self.context, self.name = key, probes, context, name
        # Of the whole pass, for what the tower itself does not return.
        self.stats: dict[str, Any] = {} if stats is None else stats
        self.stacked: list[LayerParams] = []
        self.num_extra_tokens = 0
        self._first_column: dict[int, int] = {}  # of the extra tokens of an item
        for number, (site, item) in enumerate(self._items):
            # What the first block reads is written before the blocks run.
            params = {} if site == "embed" else item.params
            layer_mask = item.layer_mask if isinstance(item, AttachedEdit) else None
            self.stacked.append((params, layer_mask))
            if site in TOKEN_SITES and isinstance(item, AttachedTokens):
                self._first_column[number] = self.num_extra_tokens
                self.num_extra_tokens += item.method.length

    def prepend(self, h: Float[Array, "B S D"]) -> Float[Array, "B PS D"]:
        """Puts the extra tokens before the rows that the first block reads."""
        if not self.num_extra_tokens:
            return h
        h = jnp.pad(h, ((0, 0), (self.num_extra_tokens, 0), (0, 0)))
        for number, item in self.at("embed"):
            h = self.write(number, item.params, h)
        return h

    def write(self, number: int, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Gives the extra tokens of one item their content."""
        content = params["embedding"].astype(h.dtype)
        content = jnp.broadcast_to(content, (h.shape[0], *content.shape))
        return jax.lax.dynamic_update_slice_in_dim(h, content, self._first_column[number], axis=1)

    def at(self, name: str) -> list[tuple[int, Attached]]:
        """What is attached at a site of the tower, with its number among all that is attached."""
        return [(n, item) for n, (site, item) in enumerate(self._items) if site == name]

    @property
    def needs_all_tokens(self) -> bool:
        """Whether some method or probe reads tokens that it was not asked about."""
        return any(_sees_all(item) for _, item in self._items) or any(
            not (reads_attention(probe) or getattr(probe, "at_queries", False))
            for probe in self.probes
        )

    def chosen_layers(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Statistics of all layers, cut down to those that each probe chooses."""
        stats = dict(stats)
        for probe in self.probes:
            layers = probe_layers(probe)
            if layers is not None and probe.name in stats:
                chosen = np.asarray(layers)
                stats[probe.name] = jax.tree.map(lambda x, c=chosen: x[c], stats[probe.name])
        return stats

    def of(self, queries: Int[Array, "B Q"]) -> "TowerHooks":
        """The hooks of some tokens of every row, which are those that the probes read."""

        def chosen(item: Attached) -> Attached:
            if not isinstance(item, AttachedEdit):
                return item
            return dataclasses.replace(item, mask=pick(item.mask, queries))

        items = [(site, chosen(item)) for site, item in self._items]
        context = self.context and dataclasses.replace(self.context, queries=None)
        return TowerHooks(items, self.key, self.probes, context, self.name, self.stats)

    def layer(self, layer_params: Sequence[LayerParams], layer: int | Array) -> LayerHooks:
        """The hooks of one layer, whose share of `stacked` is `layer_params`."""
        return LayerHooks(self, layer_params, layer)


def _sees_all(item: Attached) -> bool:
    """Whether something reads or writes all tokens at once."""
    return isinstance(item, AttachedWrite) or getattr(item.method, "sees_tokens", False)


def stack_layers(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What probes read in single layers, with a leading axis of the layers that they read."""
    names = dict.fromkeys(name for stats in each for name in stats)
    own = {name: [stats[name] for stats in each if name in stats] for name in names}
    return {name: jax.tree.map(lambda *x: jnp.stack(x), *stats) for name, stats in own.items()}


class Hooks:
    """The hooks of a whole forward pass, built by `Tuning.hooks`.

    `stats` collects what the probes read outside the LLM's blocks, with a leading layer axis.
    """

    def __init__(
        self,
        items: Sequence[tuple[str, Attached]] = (),
        key: PRNGKeyArray | None = None,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
    ) -> None:
        self._items, self._key, self._probes, self._context = items, key, probes, context
        self.stats: dict[str, Any] = {}

    def tower(self, name: str) -> TowerHooks:
        """The hooks of the blocks of `vision` or `llm`."""
        prefix = f"{name}.block."
        items = [
            (site.removeprefix(prefix).removeprefix(f"{name}."), item)
            for site, item in self._items
            if site.startswith(prefix) or site == f"{name}.embed"
        ]
        key = None if self._key is None else jax.random.fold_in(self._key, TOWERS.index(name))
        probes = [p for p in self._probes if p.site.startswith("vision.") == (name == "vision")]
        return TowerHooks(items, key, probes, self._context, name, self.stats)

    def edit(
        self, site: str, h: Float[Array, "B S D"], queries: Int[AnyArray, "B Q"] | None = None
    ) -> Float[Array, "B S D"]:
        """Edits at a site outside the blocks; `h` has the columns `queries`, or all."""
        for number, (name, item) in enumerate(self._items):
            if name == site and isinstance(item, AttachedEdit):
                if queries is not None:
                    item = dataclasses.replace(item, mask=pick(item.mask, queries))
                h = item.apply(item.params, item.layer_mask, h, self._outside_key(number))
            elif name == site and isinstance(item, AttachedWrite):
                h = item.apply(item.params, h)
        for probe in self._probes:
            if probe.site == site and self._context is not None:
                context = self._context
                if queries is not None:
                    context = dataclasses.replace(context, queries=None)
                self.stats[probe.name] = jax.tree.map(lambda x: x[None], probe.read(context, h=h))
        return h

    def linear(
        self, site: str, linear: LinearLike, x: Float[Array, "B S D"]
    ) -> Float[Array, "B S F"]:
        """The output of a linear outside the blocks, with its weight deltas."""
        items = [
            (number, item)
            for number, (name, item) in enumerate(self._items)
            if name == site and isinstance(item, AttachedDelta)
        ]
        if not items:
            return linear(x)
        deltas = [(i.method, i.params, i.common, self._outside_key(n)) for n, i in items]
        return _tuned(linear, deltas, x, items[0][1].rows)

    def _outside_key(self, number: int) -> PRNGKeyArray | None:
        """The key of a method's dropout outside the blocks."""
        if self._key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._key, len(TOWERS)), number)
