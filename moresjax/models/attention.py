"""Scaled dot-product attention.

Axis legend: B batch, N query heads, K key/value heads, G = N/K queries per key head, T queries,
S keys, H head features, C key groups.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import TokenKind
from moresjax.models.fused_attention import Runs, fused_attention

# The key groups of every attention statistic, in the order of their last axis.
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
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"] | Runs | None,
    softcap: float = 0.0,
) -> Float[Array, "B N T H"]:
    """Attention with grouped key/value heads.

    Args:
      q: The queries.
      k: The keys.
      v: The values.
      mask: True where a query sees a key; or the runs of tokens that see each other, which a fused
        kernel takes; or None when all see all.
      softcap: The soft cap on the logits; 0: none.
    """
    if isinstance(mask, Runs):
        return fused_attention(q, k, v, mask, softcap)
    probabilities = attention_probabilities(q, k, mask, softcap).astype(v.dtype)
    grouped = probabilities.reshape(q.shape[0], k.shape[1], -1, k.shape[2])
    return jnp.matmul(grouped, v).reshape(q.shape)


def group_masses(
    probabilities: Float[Array, "B N T S"], kind: Int[Array, "B S"]
) -> Float[Array, "B N T 4"]:
    """Attention mass on each of `GROUPS`; the four add up to 1 for a token that is not padding."""
    members = (kind[:, :, None] == jnp.asarray(GROUPS)).astype(probabilities.dtype)
    return jnp.einsum("bnts,bsc->bntc", probabilities, members)
