"""One pre-norm transformer block, for the decoder and for the vision encoder.

Axis legend: B batch, S tokens, D hidden size, F MLP size, N query heads, K key/value heads, H head
size, T length of the KV cache.

Every linear is called through the hooks and every branch output passes them, so an attached tuning
method acts inside the block and therefore inside rematerialisation. Sites inside a block: the
linears `q k v o gate up down`, and `attn.out`, `mlp.out`, `out`; probes also read `attn` (queries
and keys).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.models.attention import attention
from moresjax.models.layers import ACTIVATIONS, Linear, Norm, apply_rope
from moresjax.tuning.hooks import LayerHooks
from moresjax.types import AnyArray, pytree_dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape and wiring of a block."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size // num_heads
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    parallel: bool = False  # one norm feeds attention and MLP, whose outputs are added
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"  # of activations
    remat: bool = False
    unroll: bool = False  # unroll the scan over layers

    def __post_init__(self):
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear of a block."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * h, self.num_kv_heads * h
        shapes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)}
        if self.gated_mlp:
            shapes["gate"] = (d, f)
        return shapes | {"up": (d, f), "down": (f, d)}


@pytree_dataclass
class LayerCache:
    """Keys (after rotation) and values of one layer, `[B, K, T, H]`."""

    k: Float[AnyArray, "B K T H"]
    v: Float[AnyArray, "B K T H"]


class Attention(nnx.Module):
    def __init__(self, config: BlockConfig):
        def linear(name, axes, bias):
            return Linear(*config.linears()[name], axes=axes, bias=bias)

        self.config = config
        self.q = linear("q", ("embed", "heads"), config.qkv_bias)
        self.k = linear("k", ("embed", "kv_heads"), config.qkv_bias)
        self.v = linear("v", ("embed", "kv_heads"), config.qkv_bias)
        self.o = linear("o", ("heads", "embed"), config.out_bias)

    def __call__(self, x, rope, mask, hooks: LayerHooks, cache, index):
        def heads(name, count):
            y = hooks.linear(name, getattr(self, name), x)
            return y.reshape(*x.shape[:2], count, self.config.head_dim).swapaxes(1, 2)

        q = heads("q", self.config.num_heads)
        k = heads("k", self.config.num_kv_heads)
        v = heads("v", self.config.num_kv_heads)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), index, 2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), index, 2)
        hooks.read("attn", q=q, k=k)
        y = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask)
        y = y.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return hooks.linear("o", self.o, y), LayerCache(k, v)


class MLP(nnx.Module):
    def __init__(self, config: BlockConfig):
        def linear(name, axes):
            return Linear(*config.linears()[name], axes=axes, bias=config.mlp_bias)

        self.activation = config.activation
        self.gate = linear("gate", ("embed", "mlp")) if config.gated_mlp else None
        self.up = linear("up", ("embed", "mlp"))
        self.down = linear("down", ("mlp", "embed"))

    def __call__(self, x, hooks: LayerHooks):
        act = ACTIVATIONS[self.activation]
        up = hooks.linear("up", self.up, x)
        y = act(up) if self.gate is None else act(hooks.linear("gate", self.gate, x)) * up
        return hooks.linear("down", self.down, y)


class Block(nnx.Module):
    """Attention and MLP with residuals; returns the block output and its keys and values."""

    def __init__(self, config: BlockConfig):
        norm = lambda: Norm(config.hidden_size, kind=config.norm, eps=config.norm_eps)  # noqa: E731
        self.parallel = config.parallel
        self.attn_norm = norm()
        self.mlp_norm = None if config.parallel else norm()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def __call__(
        self,
        h: Float[Array, "B S D"],
        rope,
        mask: Bool[Array, "B S T"] | None,
        hooks: LayerHooks,
        cache: LayerCache | None = None,
        index: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        x = self.attn_norm(h)
        attn, cache = self.attn(x, rope, mask, hooks, cache, index)
        attn = hooks.edit("attn.out", attn)
        if self.parallel:
            mlp = hooks.edit("mlp.out", self.mlp(x, hooks))
            h = h + (attn + mlp)
        else:
            h = h + attn
            h = h + hooks.edit("mlp.out", self.mlp(self.mlp_norm(h), hooks))
        h = hooks.edit("out", h)
        hooks.read("out", h=h)
        return h, cache


@dataclasses.dataclass
class BlocksOutput:
    hidden: Float[Array, "B S D"]
    cache: list[LayerCache] | None  # one per layer
    stats: dict  # probe name -> pytree with a leading layer axis


def run_blocks(
    blocks: nnx.Module | nnx.List,
    h: Float[Array, "B S D"],
    rope,
    mask,
    hooks,
    config: BlockConfig,
    *,
    caches: list[LayerCache] | None = None,
    index=None,
    keep_cache: bool = False,
) -> BlocksOutput:
    """Runs all layers: a scan over stacked blocks, or a loop over a list of them.

    The loop is what decoding uses: each layer's cache is then a buffer of its own, updated in
    place.
    `hooks` are the `TowerHooks` of this tower; their stacked parameters are scanned beside the
    blocks.
    """

    def one_layer(h, block, theta, layer, cache=None):
        at_layer = hooks.layer(theta, layer)
        h, cache = block(h, rope, mask, at_layer, cache, index)
        return h, cache if keep_cache else None, at_layer.stats

    if isinstance(blocks, nnx.List):
        kept, stats = [], []
        for i, block in enumerate(blocks):
            theta = jax.tree.map(lambda x, i=i: x[i], hooks.stacked)
            h, cache, stat = one_layer(h, block, theta, i, caches and caches[i])
            kept.append(cache)
            stats.append(stat)
        stats = jax.tree.map(lambda *x: jnp.stack(x), *stats)
        return BlocksOutput(h, kept if keep_cache else None, stats)

    if caches is not None:
        raise ValueError("decoding needs unstacked blocks: call `unstack` on the model first")

    def body(h, xs):
        h, cache, stats = one_layer(h, *xs)
        return h, (cache, stats)

    if config.remat:
        body = jax.checkpoint(body, prevent_cse=config.unroll)
    layers = jnp.arange(config.num_layers)
    h, (cache, stats) = jax.lax.scan(
        body, h, (blocks, hooks.stacked, layers), unroll=config.num_layers if config.unroll else 1
    )
    if keep_cache:
        cache = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(config.num_layers)]
    return BlocksOutput(h, cache, stats)
