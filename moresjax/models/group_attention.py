"""How much attention groups of keys get, without an array of all queries and all keys.

Axis legend: B batch, N query heads, K key/value heads, T queries, S keys, H head features, F
features of the values, C key groups.

With values that say which group a key belongs to, what attention puts out is the mass of every
group: exact, and as cheap as attention. The passes here are therefore attention itself, on the
kernel that the LLM is on.

| queries | are read by |
|---|---|
| all, or a quarter of the keys and more | the main pass, with group columns beside the values |
| fewer | `attention_probabilities`, some queries at a time (`attention.in_chunks`) |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import LazyMask
from moresjax.models.attention import (
    attention,
    attention_probabilities,
    chunked,
    in_chunks,
    query_chunks,
)
from moresjax.models.fused_attention import LANES, Runs

# Pairs of a query and a key: a mask, or what it is worked out from.
PairMask = Bool[Array, "B T S"] | LazyMask


def one_hot(number: Int[Array, "B S"], groups: int) -> Float[Array, "B S C"]:
    """Which of the groups 0 to C - 1 each key belongs to; keys with other numbers to none."""
    return (number[:, :, None] == jnp.arange(groups)).astype(jnp.float32)


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S F"],
    own: tuple[Array, Array],
    mask: Bool[Array, "B T S"] | LazyMask | Runs | None,
    softcap: float,
    members: Float[Array, "B S C"] | None,
) -> tuple[Float[Array, "B N T F"], Float[Array, "B N T C"] | None]:
    """Attention, and the masses of key groups where the main pass is asked for them.

    Args:
      q: The queries.
      k: All keys, those of a cache too.
      v: Their values.
      own: Keys and values of the queries' tokens; what a kernel reads behind a cache.
      mask: What the queries see.
      softcap: The soft cap on the logits; 0: none.
      members: Which groups a key belongs to; None where nobody asks.
    """
    if isinstance(mask, Runs) and mask.behind_cache:
        k, v = (
            jnp.concatenate([x, mine.astype(x.dtype)], axis=2)
            for x, mine in zip((k, v), own, strict=True)
        )
    elif isinstance(mask, LazyMask | Runs) and members is not None:
        return attention_and_masses(q, k, v, mask, softcap, members)
    return attention(q, k, v, mask, softcap), None


def attention_and_masses(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S F"],
    mask: LazyMask | Runs,
    softcap: float,
    members: Float[Array, "B S C"],
) -> tuple[Float[Array, "B N T F"], Float[Array, "B N T C"]]:
    """Attention, and the mass that each query puts on each group of keys.

    The groups are columns beside the values where a kernel has room for them in the lanes that it
    computes anyway, or none is used; else the kernel runs a second time with the groups as values.

    Args:
      q: The queries.
      k: The keys.
      v: The values.
      mask: What the queries see, in a form that is never all pairs.
      softcap: The soft cap on the logits; 0: none.
      members: Which groups a key belongs to.

    Returns:
      The output, and the masses in fp32; of 16-bit queries they have the rounding of 16 bits.
    """
    groups = jnp.broadcast_to(members[:, None], (*v.shape[:3], members.shape[2])).astype(v.dtype)
    if isinstance(mask, Runs) and not _fits_beside(v.shape[3], groups.shape[3], mask):
        y = attention(q, k, v, mask, softcap)
        return y, attention(q, k, groups, mask, softcap).astype(jnp.float32)
    both = attention(q, k, jnp.concatenate([v, groups], axis=3), mask, softcap)
    return both[..., : v.shape[3]], both[..., v.shape[3] :].astype(jnp.float32)


def _fits_beside(width: int, groups: int, runs: Runs) -> bool:
    """Whether more columns cost the kernel nothing; cuDNN takes values as wide as keys only."""
    return runs.kernel == "splash" and -(-(width + groups) // LANES) == -(-width // LANES)


def group_masses(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    members: Float[Array, "B S C"],
    mask: PairMask,
    softcap: float = 0.0,
) -> Float[Array, "B N T C"]:
    """Attention mass of each query on each group, in fp32.

    The masses add up to 1 where the groups hold all keys that a query sees.

    Args:
      q: The queries.
      k: The keys.
      members: Which groups a key belongs to.
      mask: What the queries see. A dense mask is read at once, a lazy one some queries at a time.
      softcap: The soft cap on the logits; 0: none.
    """

    def read(q: Array, mask: Array) -> Array:
        probabilities = attention_probabilities(q, k, mask, softcap)
        return jnp.einsum("bnts,bsc->bntc", probabilities, members)

    return in_chunks(read, q, mask) if isinstance(mask, LazyMask) else read(q, mask)


def group_counts(members: Float[Array, "B S C"], mask: PairMask) -> Float[Array, "B T C"]:
    """How many keys of each group every query sees."""

    def read(q: Array, mask: Array) -> Array:
        del q
        return jnp.einsum("bqs,bsc->bqc", mask.astype(jnp.float32), members)[:, None]

    if not isinstance(mask, LazyMask):
        return read(members, mask)[:, 0]
    return in_chunks(read, jnp.zeros((*mask.shape[:1], 1, mask.shape[1], 1)), mask)[:, 0]


def key_sums(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    weights: Float[Array, "B T"],
    mask: PairMask | Runs,
    softcap: float = 0.0,
) -> Float[Array, "B N S"]:
    """How much attention every key gets: sums over weighted queries, for every head.

    On a kernel they are the gradient of its values: with p the attention, the gradient of the value
    of key s is the sum over queries t of p[t, s] times the gradient of the output at t.

    Args:
      q: The queries.
      k: The keys.
      weights: How much each query counts.
      mask: What the queries see.
      softcap: The soft cap on the logits; 0: none.
    """
    if isinstance(mask, Runs):
        return _kernel_key_sums(q, k, weights, mask, softcap)

    def read(q: Array, weights: Array, mask: Array) -> Array:
        return jnp.einsum("bnts,bt->bns", attention_probabilities(q, k, mask, softcap), weights)

    if not isinstance(mask, LazyMask):
        return read(q, weights, mask)
    chunks = query_chunks(mask.shape)

    def add(total: Array, xs: tuple) -> tuple[Array, None]:
        q, weights, columns = xs
        return total + read(q, weights, mask.at(columns)), None

    xs = (
        chunked(q, chunks, 2),
        chunked(weights, chunks, 1),
        chunked(jnp.asarray(mask.queries), chunks, 1),
    )
    return jax.lax.scan(add, jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32), xs)[0]


def _kernel_key_sums(
    q: Array, k: Array, weights: Array, runs: Runs, softcap: float
) -> Float[Array, "B N S"]:
    """`key_sums` by the backward pass of a kernel."""
    rows, heads, _, dim = q.shape
    together = heads // k.shape[1]  # query heads of a key head, whose gradients are added
    columns = min(together, dim)
    sums = []
    for first in range(0, together, columns):
        place = jnp.arange(heads) % together - first
        chosen = place[:, None] == jnp.arange(columns)
        gradient = weights[:, None, :, None] * chosen[None, :, None]
        values = jnp.zeros((*k.shape[:3], columns), q.dtype)
        _, pull = jax.vjp(lambda values: attention(q, k, values, runs, softcap), values)
        sums.append(pull(gradient.astype(q.dtype))[0].astype(jnp.float32))
    return jnp.moveaxis(jnp.concatenate(sums, axis=3), 3, 2).reshape(rows, heads, -1)
