"""What attached methods and probes do during one forward pass.

The models call `linear`, `edit` and `read` at their sites; with nothing attached these are the
plain linear, the identity and nothing. Sites are named `vision.block.X`, `connector.out`,
`llm.embed.out` and `llm.block.X`, X being a linear (`q k v o gate up down`) or `attn.out`,
`mlp.out`, `out`. Virtual tokens are at `vision.embed`, `llm.embed`, `X.block.in` and
`llm.block.kv`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.core.ops import pick
from moresjax.tuning.base import Edit, Params, Probe, ProbeContext, VirtualTokens, WeightDelta

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
TOWERS = ("vision", "llm")
# Where virtual tokens are tokens, inside a tower.
TOKEN_SITES = ("embed", "in")


@dataclasses.dataclass(frozen=True)
class Attached:
    """A method at one site: prepared parameters and, for edits, the mask of selected tokens.

    At layered sites every leaf of `params` and `layer_mask` has a leading layer axis; `common` is
    what a weight delta finds in its parameters at every layer. With `rows`, the adapter of each
    row, the next axis counts adapters.
    """

    method: Edit | WeightDelta | VirtualTokens
    params: Params
    layer_mask: Array | None = None
    mask: Array | None = None
    common: Params = dataclasses.field(default_factory=dict)
    rows: Int[Array, " B"] | None = None


def _by_row(function: Callable, params, x, rows: Array | None):
    """`function(params, x)`, or the same with each row's own parameters."""
    if rows is None:
        return function(params, x)
    own = jax.tree.map(lambda leaf: leaf[rows], params)
    return jax.vmap(lambda params, row: function(params, row[None])[0])(own, x)


def _apply_edit(item: Attached, params, layer_mask, h, key):
    delta = _by_row(item.method.delta, params, h, item.rows)
    if item.rows is not None:
        layer_mask = layer_mask[item.rows][:, None]
    if key is not None and item.method.dropout:
        delta = item.method.drop(key, delta, h)
    mask = item.mask if layer_mask is None else item.mask & layer_mask
    return h + jnp.where(mask[..., None], delta, 0).astype(h.dtype)


def _before(rows: Float[Array, "P F"], x: Float[Array, "B K S H"]) -> Float[Array, "B K T H"]:
    """Puts the same learned keys, or values, before those of every row."""
    batch, heads, _, dim = x.shape
    rows = rows.reshape(-1, heads, dim).swapaxes(0, 1).astype(x.dtype)
    return jnp.concatenate([jnp.broadcast_to(rows, (batch, *rows.shape)), x], axis=2)


@dataclasses.dataclass(frozen=True)
class _Tuned:
    """A linear seen through a weight delta."""

    method: WeightDelta
    params: Params
    linear: Callable
    key: PRNGKeyArray | None

    @property
    def bias(self):
        return self.linear.bias

    def dense(self):
        return self.linear.dense()

    def __call__(self, x):
        return self.method.apply(self.params, self.linear, x, self.key)


class LayerHooks:
    """The hooks of one layer. `stats` collects what the probes read."""

    def __init__(self, tower: "TowerHooks", stacked, layer):
        self._tower, self._stacked, self._layer = tower, stacked, layer
        self.stats = {}

    def _key(self, site_number: int):
        if self._tower.key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._tower.key, self._layer), site_number)

    def at(self, queries: Int[Array, "B Q"]) -> "LayerHooks":
        """The hooks of some tokens of every row; they add to the same statistics."""
        part = LayerHooks(self._tower.of(queries), self._stacked, self._layer)
        part.stats = self.stats
        return part

    def linear(self, name: str, linear: Callable, x: Float[Array, "B S D"]):
        items = self._tower.at(name)
        if not items:
            return linear(x)

        def tuned(each_params, x):
            whole = linear
            for params, (number, item) in zip(each_params, items, strict=True):
                whole = _Tuned(item.method, params | item.common, whole, self._key(number))
            return whole(x)

        each_params = [self._stacked[number][0] for number, _ in items]
        return _by_row(tuned, each_params, x, items[0][1].rows)

    def edit(self, name: str, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        for number, item in self._tower.at(name):
            h = _apply_edit(item, *self._stacked[number], h, self._key(number))
        return h

    def enter(self, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The input of the block: extra tokens that have content at this layer get it."""
        for number, _ in self._tower.at("in"):
            h = self._tower.write(number, self._stacked[number][0], h)
        return h

    def extend(
        self, k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Keys (after rotation) and values, with the learned ones before them."""
        for number, _ in reversed(self._tower.at("kv")):
            params, _ = self._stacked[number]
            k, v = _before(params["k"], k), _before(params["v"], v)
        return k, v

    def read_attention(self, q, k, mask: Array | None, softcap: float) -> None:
        """Shows queries and keys to the probes, as `attn`.

        Args:
          mask: what this layer's queries see, when that differs between layers; else None.
          softcap: of the layer's attention logits.
        """
        if not any(probe.site == "attn" for probe in self._tower.probes):
            return
        context = dataclasses.replace(self._tower.context, softcap=softcap)
        if mask is not None:
            if context.queries is not None:
                mask = jnp.take_along_axis(mask, context.queries[:, :, None], axis=1)
            context = dataclasses.replace(context, mask=mask)
        self._read(context, "attn", q=q, k=k)

    def read(self, name: str, **tensors: Array) -> None:
        self._read(self._tower.context, name, **tensors)

    def _read(self, context: ProbeContext | None, name: str, **tensors: Array) -> None:
        for probe in self._tower.probes:
            if probe.site == name:
                self.stats[probe.name] = probe.read(context, **tensors)


class TowerHooks:
    """The hooks of all layers of one tower. `stacked` is scanned beside the blocks."""

    def __init__(
        self,
        items: Sequence[tuple[str, Attached]] = (),
        key: PRNGKeyArray | None = None,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
    ):
        self._items = list(items)
        self.key, self.probes, self.context = key, probes, context
        self.stacked = [
            ({}, None) if site == "embed" else (item.params, item.layer_mask)
            for site, item in self._items
        ]
        self.num_extra_tokens, self._places = 0, {}
        for number, (site, item) in enumerate(self._items):
            if site in TOKEN_SITES:
                self._places[number] = self.num_extra_tokens
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
        return jax.lax.dynamic_update_slice_in_dim(h, content, self._places[number], axis=1)

    def at(self, name: str):
        return [(n, item) for n, (site, item) in enumerate(self._items) if site == name]

    @property
    def needs_all_tokens(self) -> bool:
        """Whether some method or probe reads tokens that it was not asked about."""
        methods = (item.method for _, item in self._items)
        return any(getattr(method, "sees_tokens", False) for method in methods) or any(
            probe.site == "out" for probe in self.probes
        )

    def of(self, queries: Int[Array, "B Q"]) -> "TowerHooks":
        """The hooks of some tokens of every row, which are those that the probes read."""

        def chosen(item):
            if item.mask is None:
                return item
            return dataclasses.replace(item, mask=pick(item.mask, queries))

        items = [(site, chosen(item)) for site, item in self._items]
        context = self.context and dataclasses.replace(self.context, queries=None)
        return TowerHooks(items, self.key, self.probes, context)

    def layer(self, stacked, layer) -> LayerHooks:
        return LayerHooks(self, stacked, layer)


class Hooks:
    """The hooks of a whole forward pass, built by `Tuning.hooks`."""

    def __init__(
        self,
        items: Sequence[tuple[str, Attached]] = (),
        key: PRNGKeyArray | None = None,
        probes: Sequence[Probe] = (),
        context: ProbeContext | None = None,
    ):
        self._items, self._key, self._probes, self._context = items, key, probes, context

    def tower(self, name: str) -> TowerHooks:
        """The hooks of the blocks of `vision` or `llm`."""
        prefix = f"{name}.block."
        items = [
            (s.removeprefix(prefix).removeprefix(f"{name}."), i)
            for s, i in self._items
            if s.startswith(prefix) or s == f"{name}.embed"
        ]
        key = None if self._key is None else jax.random.fold_in(self._key, TOWERS.index(name))
        if name == "llm":
            return TowerHooks(items, key, self._probes, self._context)
        return TowerHooks(items, key)

    def edit(self, site: str, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Edits at a site outside the blocks."""
        for number, (name, item) in enumerate(self._items):
            if name == site:
                key = self._key
                if key is not None:
                    key = jax.random.fold_in(jax.random.fold_in(key, len(TOWERS)), number)
                h = _apply_edit(item, item.params, item.layer_mask, h, key)
        return h
