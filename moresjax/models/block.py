"""One pre-norm transformer block, for the decoder and for the vision encoder.

Axis legend: B batch, S tokens, D hidden size, F MLP size, N query heads, K key/value heads, H head
size, T length of the KV cache.

Every linear is called through the hooks and every branch output passes them, so an attached tuning
method acts inside the block and therefore inside rematerialisation. Sites inside a block: the
linears `q k v o gate up down`, and `attn.out`, `mlp.out`, `out`; virtual tokens come in at `in` and
`kv`; probes also read `attn` (queries and keys).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.errors import UserError
from moresjax.core.layout import LazyMask
from moresjax.core.ops import pick, write_at
from moresjax.core.ranges import AtLeastZero, Finite, Layers, NonNegative, Width, check_ranges
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.models.block_checks import check_heads, check_kinds
from moresjax.models.fused_attention import Runs
from moresjax.models.group_attention import attend
from moresjax.models.layers import ACTIVATIONS, Linear, Norm, Rope, apply_rope, param, unstack
from moresjax.sharding.mesh import constrain_batch_sharding
from moresjax.tuning.hooks import LayerHooks, TowerHooks, stack_layers

# What every query sees: a mask that is True at its keys, also in a lazy form, or a kernel's runs.
Mask = Bool[Array, "B S T"] | LazyMask | Runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape and wiring of a block.

    Raises:
      UserError: for a name of a norm, an activation or a dtype that does not exist, heads that do
        not divide, or a pattern of local and global layers that cannot be.
    """

    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Width
    num_kv_heads: NonNegative = 0  # 0: as many as query heads
    head_dim: NonNegative = 0  # 0: hidden_size // num_heads
    norm: str = "rms"  # rms | layer
    norm_eps: AtLeastZero = 1e-6
    norm_offset: Finite = 0.0  # added to the scale of every norm (Gemma: 1)
    qk_norm: bool = False  # RMSNorm over each head's queries and keys, before the rotation
    post_norms: bool = False  # also norms on the outputs of attention and MLP
    query_scale: AtLeastZero = 0.0  # factor on the attention logits; 0: head_dim ** -0.5
    attention_softcap: AtLeastZero = 0.0  # 0: none
    window: NonNegative = 0  # keys a query of a local layer sees, itself included
    attention_pattern: str = "g"  # l(ocal) or g(lobal) layers, repeated
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    parallel: bool = False  # one norm feeds attention and MLP, whose outputs are added
    qkv_bias: bool = False
    k_bias: bool = True  # whether keys have that bias too (EVA: queries and values only)
    out_bias: bool = False
    mlp_bias: bool = False
    layer_scale: bool = False  # a learned factor per feature after attention and after the MLP
    dtype: str = "float32"  # dtype of the activations
    remat: bool = False
    unroll: bool = False  # unroll the scan over layers
    int8: bool = False  # kernels of whole numbers, with a factor per output feature
    # The family in `transformers`, which is no part of the architecture; empty: not known.
    model_type: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        check_heads(self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim)
        check_kinds(self.norm, self.activation, self.dtype)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        pattern = self.attention_pattern
        if not pattern or set(pattern) - set("lg") or ("l" in pattern and self.window < 1):
            raise UserError(
                f"attention_pattern {pattern!r} must consist of l (local; needs a window of at "
                f"least 1, got {self.window}) and g (global)"
            )

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers see a sliding window only."""
        pattern = self.attention_pattern
        return tuple(pattern[i % len(pattern)] == "l" for i in range(self.num_layers))

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear of a block."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * h, self.num_kv_heads * h
        shapes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)}
        if self.gated_mlp:
            shapes["gate"] = (d, f)
        return shapes | {"up": (d, f), "down": (f, d)}

    def norms(self) -> tuple[str, ...]:
        """The names of the norms of a block."""
        plain = ("attn_norm",) if self.parallel else ("attn_norm", "mlp_norm")
        post = ("attn_post_norm", "mlp_post_norm") if self.post_norms else ()
        return (*plain, *post, *(("q_norm", "k_norm") if self.qk_norm else ()))


@pytree_dataclass
class LayerCache:
    """Keys (after rotation) and values of one layer, `[B, K, T, H]`."""

    k: Float[AnyArray, "B K T H"]
    v: Float[AnyArray, "B K T H"]


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads; its linears are called through the hooks."""

    def __init__(self, config: BlockConfig) -> None:
        def linear(name: str, axes: tuple, bias: bool) -> Linear:
            return Linear(*config.linears()[name], axes=axes, bias=bias, int8=config.int8)

        self.config = config
        self.q = linear("q", ("embed", "heads"), config.qkv_bias)
        self.k = linear("k", ("embed", "kv_heads"), config.qkv_bias and config.k_bias)
        self.v = linear("v", ("embed", "kv_heads"), config.qkv_bias)
        self.o = linear("o", ("heads", "embed"), config.out_bias)

        def norm() -> Norm | None:
            if not config.qk_norm:
                return None
            eps, offset = config.norm_eps, config.norm_offset
            return Norm(config.head_dim, axes=(None,), eps=eps, offset=offset)

        self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: Rope | None,
        mask: Mask | None,
        hooks: LayerHooks,
        cache: LayerCache | None,
        index: Int[AnyArray, "..."] | int | None,
        queries: Int[Array, "B Q"] | None,
    ) -> tuple[Float[Array, "B Q D"], LayerCache]:
        """The output at the queries (default: all tokens), and the keys and values."""
        config, mask = self.config, hooks.mask(mask)

        def heads(name: str, count: int) -> Float[Array, "B N S H"]:
            y = hooks.linear(name, getattr(self, name), x)
            return y.reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)

        k = heads("k", config.num_kv_heads)
        v = heads("v", config.num_kv_heads)
        key_rope = rope
        if queries is not None:
            x, mask, hooks = pick(x, queries), pick(dense(mask), queries), hooks.at(queries)
            rope = rope and (pick(rope[0], queries, 2), pick(rope[1], queries, 2))
        q = heads("q", config.num_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.query_scale:
            # Attention divides by the root of the head size; what it should do instead is put into
            # the queries, where probes see it too.
            q = q * (config.query_scale * config.head_dim**0.5)
        if rope is not None and key_rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, key_rope)
        own = k, v = hooks.extend(k, v)
        if cache is not None and index is not None:
            k, v = write_at(cache.k, k, index, 2), write_at(cache.v, v, index, 2)
        tensors, softcap = (q, k.astype(q.dtype), v.astype(q.dtype)), config.attention_softcap
        y, masses = attend(*tensors, own, mask, softcap, hooks.key_groups())
        lazy = isinstance(mask, LazyMask | Runs)
        hooks.read_attention(q, k, mask if config.window or lazy else None, softcap, masses)
        y = y.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return hooks.linear("o", self.o, y), LayerCache(k, v)


class MLP(nnx.Module):
    """The feed-forward part of a block; its linears are called through the hooks."""

    def __init__(self, config: BlockConfig) -> None:
        def linear(name: str, axes: tuple) -> Linear:
            shape, bias = config.linears()[name], config.mlp_bias
            return Linear(*shape, axes=axes, bias=bias, int8=config.int8)

        self.activation = config.activation
        self.gate = linear("gate", ("embed", "mlp")) if config.gated_mlp else None
        self.up = linear("up", ("embed", "mlp"))
        self.down = linear("down", ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B S D"], hooks: LayerHooks) -> Float[Array, "B S D"]:
        """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""
        act = ACTIVATIONS[self.activation]
        up = hooks.linear("up", self.up, x)
        # What is between the products is cheap: made again for the backward pass, and not kept.
        if self.gate is None:
            y = jax.checkpoint(act)(up)
        else:
            gate = hooks.linear("gate", self.gate, x)
            y = jax.checkpoint(lambda gate, up: act(gate) * up)(gate, up)
        return hooks.linear("down", self.down, y)


def dense(mask: Mask | None) -> Bool[Array, "B S T"]:
    """The mask, which must be an array."""
    assert mask is not None
    assert not isinstance(mask, LazyMask | Runs)
    return mask


def normed(y: Float[Array, "B S D"], norm: Norm | None) -> Float[Array, "B S D"]:
    """A branch output through its norm, if it has one."""
    return y if norm is None else norm(y)


def scaled(y: Float[Array, "B S D"], scale: nnx.Param | None) -> Float[Array, "B S D"]:
    """A branch output times its layer scale, if it has one."""
    return y if scale is None else y * scale[...].astype(y.dtype)


class Block(nnx.Module):
    """Attention and MLP with residuals."""

    def __init__(self, config: BlockConfig) -> None:
        def norm() -> Norm:
            return Norm(
                config.hidden_size,
                kind=config.norm,
                eps=config.norm_eps,
                offset=config.norm_offset,
            )

        self.parallel = config.parallel
        self.attn_norm = norm()
        self.mlp_norm = None if config.parallel else norm()
        self.attn_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None
        self.attn = Attention(config)
        self.mlp = MLP(config)

        def scale() -> nnx.Param | None:
            return (
                param((config.hidden_size,), ("embed",), fill=1.0) if config.layer_scale else None
            )

        self.attn_scale, self.mlp_scale = scale(), scale()

    def __call__(
        self,
        h: Float[Array, "B S D"],
        rope: Rope | None,
        mask: Mask | None,
        hooks: LayerHooks,
        cache: LayerCache | None = None,
        index: Int[AnyArray, "..."] | int | None = None,
        queries: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B Q D"], LayerCache]:
        """The output of the block, and its keys and values.

        Args:
          h: The output of the block before.
          rope: The rotation of the tokens; None without rotary positions.
          mask: What every token sees; None when all see all.
          hooks: The methods and probes of this layer.
          cache: Keys and values of earlier tokens, with room for these.
          index: The column of the cache where these go; one for all rows, or `[B]`.
          queries: The tokens whose output is computed; default: all. The mask must be dense.
        """
        h = hooks.enter(h)
        x = self.attn_norm(h)
        attn, cache = self.attn(x, rope, mask, hooks, cache, index, queries)
        if queries is not None:
            h, x, hooks = pick(h, queries), pick(x, queries), hooks.at(queries)
        attn = scaled(normed(attn, self.attn_post_norm), self.attn_scale)
        attn = hooks.edit("attn.out", attn)
        if self.parallel:
            mlp = scaled(normed(self.mlp(x, hooks), self.mlp_post_norm), self.mlp_scale)
            h = h + (attn + hooks.edit("mlp.out", mlp))
        else:
            h = h + attn
            mlp = self.mlp(normed(h, self.mlp_norm), hooks)
            mlp = scaled(normed(mlp, self.mlp_post_norm), self.mlp_scale)
            h = h + hooks.edit("mlp.out", mlp)
        return hooks.edit("out", h), cache


@dataclasses.dataclass
class BlocksOutput:
    """What the blocks of a tower return.

    Attributes:
      hidden: hidden states of all tokens, or of the queries.
      cache: keys and values, one per layer; None when nobody asked for them.
      stats: probe name -> pytree with a leading layer axis.
    """

    hidden: Float[Array, "B S D"]
    cache: list[LayerCache] | None
    stats: dict[str, Any]


# Rotation and mask of a layer.
View = tuple[Rope | None, Mask | None]
# What one layer returns: output, keys and values, statistics.
LayerOutput = tuple[Float[Array, "B Q D"], LayerCache | None, dict[str, Any]]


def run_blocks(
    blocks: nnx.Module | nnx.List,
    h: Float[Array, "B S D"],
    rope: Rope | None,
    mask: Mask | None,
    hooks: TowerHooks,
    config: BlockConfig,
    *,
    local: View | None = None,
    caches: list[LayerCache] | None = None,
    index: Int[AnyArray, "..."] | int | None = None,
    keep_cache: bool = False,
    queries: Int[Array, "B Q"] | None = None,
) -> BlocksOutput:
    """Runs all layers: a scan over stacked blocks, or a loop over a list of them.

    The loop is what decoding uses: each layer's cache is then a buffer of its own, updated in
    place.

    Args:
      blocks: The blocks, stacked or in a list.
      h: What the first block reads.
      rope: The rotation of the tokens; None without rotary positions.
      mask: What every token sees; None when all see all.
      hooks: The methods and probes of this tower; their stacked parameters are scanned beside the
        blocks.
      config: The shape of the blocks.
      local: Rotation and mask of local layers, where some layers are local.
      caches: Keys and values of earlier tokens, one per layer; needs a list of blocks.
      index: The column of the caches where the new keys and values go; one for all rows, or `[B]`.
      keep_cache: Returns keys and values.
      queries: The tokens whose output is returned; default: all. A loop computes no others in the
        last layer, unless a kernel, a probe or a method needs them all.

    Raises:
      ValueError: for caches with stacked blocks.
    """

    def one_layer(
        h: Float[Array, "B S D"],
        block: Block,
        params: Sequence,
        layer: int | Int[Array, ""],
        cache: LayerCache | None = None,
        queries: Int[Array, "B Q"] | None = None,
    ) -> LayerOutput:
        layer_hooks = hooks.layer(params, layer)
        h = constrain_batch_sharding(h)
        layer_rope, layer_mask = _view(config.local_layers, layer, (rope, mask), local)
        h, cache = block(h, layer_rope, layer_mask, layer_hooks, cache, index, queries)
        return h, cache if keep_cache else None, layer_hooks.stats

    last_queries = None
    if isinstance(blocks, nnx.List) or (config.unroll and caches is None):
        in_list = isinstance(blocks, nnx.List)
        each = blocks if in_list else unstack(blocks, config.num_layers)
        if in_list and not isinstance(mask, LazyMask | Runs) and not hooks.needs_all_tokens:
            last_queries = queries
        h, kept, stats = _loop(one_layer, h, each, hooks, config, caches, last_queries)
    elif caches is not None:
        raise ValueError("decoding needs unstacked blocks: call `unstack` on the model first")
    else:
        h, kept, stats = _scan(one_layer, h, blocks, hooks, config)
        stats = hooks.chosen_layers(stats)
    if queries is not None and last_queries is None:
        h = pick(h, queries)
    return BlocksOutput(h, kept if keep_cache else None, stats)


def _view(
    is_local: tuple[bool, ...], layer: int | Int[Array, ""], common: View, local: View | None
) -> View:
    """Rotation and mask of a layer, whose number inside a scan is data."""
    if local is None or not any(is_local):
        return common
    if all(is_local):
        return local
    if isinstance(layer, int):
        return local if is_local[layer] else common
    chosen = jnp.asarray(is_local)[layer]

    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, LazyMask | Runs):
            return dataclasses.replace(a, local=chosen)
        return a if a is b else jnp.where(chosen, a, b)

    return jax.tree.map(choose, local, common, is_leaf=lambda x: isinstance(x, LazyMask | Runs))


def _loop(
    one_layer: Callable[..., LayerOutput],
    h: Float[Array, "B S D"],
    blocks: Sequence[Block] | nnx.List,
    hooks: TowerHooks,
    config: BlockConfig,
    caches: list[LayerCache] | None,
    last_queries: Int[Array, "B Q"] | None,
) -> tuple[Float[Array, "B Q D"], list, dict[str, Any]]:
    """The layers one after the other; the last one at `last_queries` only, if there are some."""
    step = jax.checkpoint(one_layer, static_argnums=3) if config.remat else one_layer
    kept, stats = [], []
    for i, block in enumerate(blocks):
        params = jax.tree.map(lambda x, i=i: x[i], hooks.stacked)
        queries = last_queries if i == config.num_layers - 1 else None
        h, cache, stat = step(h, block, params, i, caches and caches[i], queries)
        kept.append(cache)
        stats.append(stat)
    return h, kept, stack_layers(stats)


def _scan(
    one_layer: Callable[..., LayerOutput],
    h: Float[Array, "B S D"],
    blocks: nnx.Module,
    hooks: TowerHooks,
    config: BlockConfig,
) -> tuple[Float[Array, "B S D"], list | None, dict[str, Any]]:
    """The layers as one compiled body that is repeated."""

    def body(h: Array, xs: tuple) -> tuple[Array, tuple]:
        h, cache, stats = one_layer(h, *xs)
        return h, (cache, stats)

    if config.remat:
        body = jax.checkpoint(body, prevent_cse=config.unroll)
    number, layers = config.num_layers, jnp.arange(config.num_layers)
    xs = (blocks, hooks.stacked, layers)
    h, (cache, stats) = jax.lax.scan(body, h, xs, unroll=number if config.unroll else 1)
    if cache is not None:
        cache = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(number)]
    return h, cache, stats
