"""What attached methods and probes do during one forward pass.

Axis legend: B rows, S tokens, D hidden size, K key heads, H head size, P virtual tokens.

The models call `linear` and `edit` at their sites; with nothing attached these are the plain linear
and the identity. What `edit` returns is shown to the probes of the site, and what a linear X of a
block reads to those of `X.in`. Sites are named
`vision.block.X`, `connector.N` (its linear number N), `connector.out`, `llm.embed.out`,
`llm.norm.out` and `llm.block.X`, X being a linear (`q k v o gate up down`) or `attn.out`,
`mlp.out`, `out`; writes may also be at `llm.block.attn.mask`, which keys each query sees. Virtual
tokens are at `vision.embed`, `llm.embed`, `X.block.in` and `llm.block.kv`.

`Hooks` serve a whole forward pass, `TowerHooks` the blocks of the LLM or of the vision encoder,
`LayerHooks` one of these blocks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.core.ops import pick
from moresjax.core.types import AnyArray
from moresjax.tuning.attached import (
    Attached,
    AttachedDelta,
    AttachedEdit,
    AttachedTokens,
    AttachedWrite,
    put_before,
    tuned_linear,
)
from moresjax.tuning.base import LinearLike, Params
from moresjax.tuning.probes import (
    Probe,
    ProbeContext,
    probe_layers,
    probe_members,
    reads_attention,
)

TOWERS = ("vision", "llm")
# Where virtual tokens are tokens, inside a tower.
TOKEN_SITES = ("embed", "in")


# Parameters and layer mask of one method in one layer, or stacked over layers.
LayerParams = tuple[Params, Array | None]


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

        deltas = [(item, self._params[number][0], self._key(number)) for number, item in items]
        return tuned_linear(linear, deltas, x)

    def edit(self, name: str, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The output of a branch or block after the edits that are attached to it."""
        for number, item in self._tower.at(name):
            if isinstance(item, AttachedEdit):
                h = item.apply(*self._params[number], h, self._key(number))
            elif isinstance(item, AttachedWrite):
                h = item.apply(self._params[number][0], h)
        self._read(self._tower.context, name, h=h)
        return h

    def mask(self, mask: Any) -> Any:
        """What the block's queries see, after the writes at `attn.mask`, which need a dense one."""
        for number, item in self._tower.at("attn.mask"):
            assert isinstance(item, AttachedWrite)  # nothing else is there
            mask = item.write(self._params[number][0], mask)
        return mask

    def enter(self, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The input of the block: extra tokens that have content at this layer get it."""
        for number, _ in self._tower.at("in"):
            h = self._tower.write(number, self._params[number][0], h)
        return h

    def extend(
        self, k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Keys (after rotation) and values, with the learned ones before them."""
        for number, item in reversed(self._tower.at("kv")):
            assert isinstance(item, AttachedTokens)  # nothing else is there
            params, _ = self._params[number]
            k = put_before(params["k"], k, item.rows)
            v = put_before(params["v"], v, item.rows)
        return k, v

    def key_groups(self) -> Float[Array, "B T C"] | None:
        """The groups of keys whose masses the main pass of attention is asked for.

        It is where probes read all queries or a quarter of the keys and more; fewer cost less by
        themselves. None where no probe does, and where the pass has a dense mask.
        """
        context = self._tower.context
        if context is None or context.seen is None:
            return None
        if context.queries is not None and 4 * context.queries.shape[1] < context.kind.shape[1]:
            return None
        groups = [members(context) for members in map(probe_members, self._tower.probes) if members]
        return jnp.concatenate(groups, axis=2) if groups else None

    def read_attention(
        self,
        q: Float[Array, "B N S H"],
        k: Float[Array, "B K T H"],
        mask: Any,
        softcap: float,
        masses: Float[Array, "B N S C"] | None = None,
    ) -> None:
        """Shows queries and keys to the probes, as `attn`.

        Args:
          q: The queries.
          k: The keys.
          mask: What this layer's queries see, when that differs between layers or is no array; else
            None.
          softcap: The soft cap on the layer's attention logits.
          masses: What the queries put on `key_groups`.
        """
        context = self._tower.context
        if context is None or not any(map(reads_attention, self._tower.probes)):
            return
        context = dataclasses.replace(context, softcap=softcap)
        if isinstance(mask, jax.Array):
            if context.queries is not None:
                mask = jnp.take_along_axis(mask, context.queries[:, :, None], axis=1)
            context = dataclasses.replace(context, mask=mask)
        elif mask is not None:
            assert context.seen is not None  # because there is no mask of all pairs
            seen = dataclasses.replace(context.seen, window=mask.window, local=mask.local)
            context = dataclasses.replace(context, seen=seen, view=mask)
            if context.mask is not None:
                context = dataclasses.replace(context, mask=seen.dense())
        first = 0
        for probe in self._tower.probes:
            own, members = context, probe_members(probe)
            if masses is not None and members:
                count = members(context).shape[2]
                own = dataclasses.replace(context, masses=masses[..., first : first + count])
                first += count
            if reads_attention(probe):
                self._read_probe(probe, own, "attn", q=q, k=k)

    def _read(self, context: ProbeContext | None, name: str, **tensors: Array) -> None:
        """Shows tensors to the probes of a site; in a scan, whatever layers they choose."""
        for probe in self._tower.probes:
            self._read_probe(probe, context, name, **tensors)

    def _read_probe(
        self, probe: Probe, context: ProbeContext | None, name: str, **tensors: Array
    ) -> None:
        layers = probe_layers(probe)
        if layers is not None and isinstance(self._layer, int) and self._layer not in layers:
            return
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
        content, (_, item) = params["embedding"].astype(h.dtype), self._items[number]
        assert isinstance(item, AttachedTokens)  # nothing else is written
        content = content if item.rows is None else content[item.rows]
        content = jnp.broadcast_to(content, (h.shape[0], *content.shape[-2:]))
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
        return tuned_linear(linear, [(i, i.params, self._outside_key(n)) for n, i in items], x)

    def places(self, prefix: str) -> list[Int[Array, " B"] | None]:
        """The places of all rows, of each weight delta at the sites that begin with `prefix`."""
        return [item.rows for item in self._deltas(prefix)]

    def of_row(self, prefix: str, places: Sequence[Int[Array, ""] | None]) -> "Hooks":
        """The weight deltas at the sites that begin with `prefix`, for a single row.

        Args:
          prefix: The beginning of the sites.
          places: That row's, of what `places` gives.
        """
        own = iter(places)
        items = []
        for site, item in self._items:
            if site.startswith(prefix) and isinstance(item, AttachedDelta):
                place = next(own)
                rows = None if place is None else place[None]
                items.append((site, dataclasses.replace(item, rows=rows)))
        return Hooks(items)

    def _deltas(self, prefix: str) -> list[AttachedDelta]:
        return [
            item
            for site, item in self._items
            if site.startswith(prefix) and isinstance(item, AttachedDelta)
        ]

    def _outside_key(self, number: int) -> PRNGKeyArray | None:
        """The key of a method's dropout outside the blocks."""
        if self._key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._key, len(TOWERS)), number)
