"""Sizes of batches, prompts, prefixes and caches: few of them, for few compilations."""

import jax
import jax.numpy as jnp

from moresjax.sharding.mesh import batch_shards


def bucket(length: int, smallest: int = 32) -> int:
    """The padded length of a prompt.

    Buckets are the powers of two and the quarters between them, at least `smallest // 2` apart.

    >>> [bucket(length) for length in (1, 33, 65, 300)]
    [32, 48, 80, 320]

    Args:
      length: number of tokens.
      smallest: the smallest bucket.
    """
    step = max(2 ** (max(length - 1, 1).bit_length() - 3), smallest // 2)
    return max(-(-length // step) * step, smallest)


def rounded(length: int) -> int:
    """A prefix length up to a multiple of 16, so that prefixes of like length share programs."""
    return -(-length // 16) * 16


def rounded_rows(count: int, most: int, shards: int = 1) -> int:
    """The rows of a batch for so many prompts: a power of two, but not more than asked for.

    >>> [rounded_rows(count, 24) for count in (1, 2, 5, 17)]
    [1, 2, 8, 24]

    Args:
      count: The number of prompts.
      most: The largest batch.
      shards: The number of devices that the rows are split over.
    """
    rows = 1 << max(count - 1, 0).bit_length()
    return min(rows + -rows % shards, most)


def lengthened(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    """The array, padded with `value` at the end of one axis up to a length.

    Args:
      x: an array of at most that length.
      axis: the axis that is padded.
      length: its size afterwards.
      value: the constant that fills the new places.
    """
    if x.shape[axis] == length:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pads, constant_values=value)


def num_pieces(rows: int, asked: int, token_bytes: int, most_bytes: int) -> int:
    """In how many pieces, each with equally many tokens of every row, logits are computed.

    Args:
      rows: The number of rows.
      asked: The number of scored tokens of a row.
      token_bytes: The bytes of one token's logits.
      most_bytes: The bytes that a device may have in memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    own_rows = rows if rows % shards else rows // shards
    return -(-asked // max(most_bytes // (own_rows * token_bytes), 1))
