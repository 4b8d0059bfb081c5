"""Scaled dot-product attention.

Axis legend: B batch, N query heads, K key/value heads, G = N/K queries per key head, T queries,
S keys, H head features, F features of the values, C key groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from moresjax.core.layout import LazyMask, TokenKind
from moresjax.models.fused_attention import Runs, fused_attention

# Pairs of query and key whose logits a head has at a time, where queries are read in chunks.
PAIRS = 2**20
# The key groups of the usual attention statistics, in the order of their last axis.
GROUPS = (TokenKind.SYSTEM, TokenKind.IMAGE, TokenKind.QUESTION, TokenKind.ANSWER)


def soft_cap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`: values stay within +-cap; 0 leaves them as they are."""
    return jnp.tanh(x / cap) * cap if cap else x


def attention_probabilities(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"] | None,
    softcap: float = 0.0,
) -> Float[Array, "B N T S"]:
    """Softmax over the visible keys, in fp32, of logits that are soft-capped before masking."""
    batch, heads, queries, dim = q.shape
    # Query heads of one key head are stacked along the queries: everything stays four-dimensional.
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    # Products of queries and keys exceed what float16 can hold.
    wide = jnp.float32 if q.dtype == jnp.float16 else None
    logits = jnp.matmul(grouped, k.swapaxes(-1, -2), preferred_element_type=wide)
    logits = logits.astype(jnp.float32) * dim**-0.5
    logits = soft_cap(logits, softcap)
    logits = logits.reshape(batch, heads, queries, -1)
    return _softmax(logits, None if mask is None else mask[:, None])


@jax.custom_vjp
def _softmax(
    logits: Float[Array, "B N T S"], mask: Bool[Array, "B 1 T S"] | None
) -> Float[Array, "B N T S"]:
    """Softmax over what `mask` leaves.

    For the backward pass it keeps the probabilities alone; differentiated step by step it would
    keep three arrays of that size.
    """
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def _softmax_forward(logits: Array, mask: Array | None) -> tuple[Array, tuple]:
    probabilities = _softmax(logits, mask)
    return probabilities, (probabilities, mask)


def _softmax_backward(kept: tuple, gradient: Array) -> tuple[Array, None]:
    probabilities, mask = kept
    weighted = probabilities * gradient
    gradient = weighted - probabilities * weighted.sum(-1, keepdims=True)
    # Of a query that sees nothing all keys are equally likely, and none moves.
    return (gradient if mask is None else jnp.where(mask, gradient, 0)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S F"],
    mask: Bool[Array, "B T S"] | LazyMask | Runs | None,
    softcap: float = 0.0,
) -> Float[Array, "B N T F"]:
    """Attention with grouped key/value heads.

    Args:
      q: The queries.
      k: The keys.
      v: The values.
      mask: True where a query sees a key; or that in a lazy form, for queries that are read some at
        a time; or the runs of tokens that see each other, which a fused kernel takes; or None when
        all see all.
      softcap: The soft cap on the logits; 0: none.
    """
    if isinstance(mask, Runs):
        return fused_attention(q, k, v, mask, softcap)
    if isinstance(mask, LazyMask):
        return in_chunks(lambda q, mask: attention(q, k, v, mask, softcap), q, mask)
    probabilities = attention_probabilities(q, k, mask, softcap).astype(v.dtype)
    grouped = probabilities.reshape(q.shape[0], k.shape[1], -1, k.shape[2])
    return jnp.matmul(grouped, v).reshape(*q.shape[:3], v.shape[3])


def in_chunks(
    read: Callable[[Array, Array], Array], q: Float[Array, "B N T H"], mask: LazyMask
) -> Float[Array, "B N T F"]:
    """What some queries at a time read, so that no array has all queries and all keys.

    So many are taken that each head has `PAIRS` logits at most; all at once where that is enough.
    For the backward pass the logits are made again.

    Args:
      read: Gives `[B, N, t, F]` of queries `[B, N, t, H]` and their mask `[B, t, S]`.
      q: All queries.
      mask: What they see.
    """
    chunks, count = query_chunks(mask.shape), mask.shape[1]
    if chunks == 1:
        return read(q, mask.dense())
    one = jax.checkpoint(lambda q, columns: read(q, mask.at(columns)), prevent_cse=False)
    xs = chunked(q, chunks, 2), chunked(jnp.asarray(mask.queries), chunks, 1)
    y = jnp.moveaxis(jax.lax.map(lambda xs: one(*xs), xs), 0, 2)
    return y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :count]


def query_chunks(shape: tuple[int, ...]) -> int:
    """The number of chunks in which queries are read, from rows, queries and keys."""
    _, count, keys = shape
    return -(-count // max(1, PAIRS // keys))


def chunked(x: Shaped[Array, "..."], chunks: int, axis: int) -> Shaped[Array, "..."]:
    """Chunks of equal size of what is there for every query, in front; zeros fill the last one."""
    size = -(-x.shape[axis] // chunks)
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, chunks * size - x.shape[axis])
    x = jnp.pad(x, missing)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)
