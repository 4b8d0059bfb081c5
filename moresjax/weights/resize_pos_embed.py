"""Position embeddings of an image size other than the trained one.

Axis legend: P patches, D features, n, m patches per side before and after.
"""

import math

import numpy as np
from jaxtyping import Float

# The constant of the cubic kernel in torch's bicubic interpolation.
SHARPNESS = -0.75


def resize_pos_embed(
    table: Float[np.ndarray, "P D"], side: int, prefix: int
) -> Float[np.ndarray, "Q D"]:
    """The table for `side` x `side` patches, interpolated as DINOv2 does it at every call.

    Args:
      table: Embeddings of `prefix` tokens and of a square of patches.
      side: Patches per side of the new square.
      prefix: How many rows come before the patches; they stay as they are.
    """
    kept, grid = table[:prefix], table[prefix:].astype(np.float32)
    old = math.isqrt(len(grid))
    along = _bicubic(old, side)
    grid = np.einsum("an,bm,nmd->abd", along, along, grid.reshape(old, old, -1), optimize=True)
    return np.concatenate([kept, grid.reshape(side * side, -1).astype(table.dtype)])


def _bicubic(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """Weights of n samples in each of m, half-pixel centres, borders repeated."""
    centre = (np.arange(m) + 0.5) * n / m - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((m, n), np.float32)
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
        far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
        column = np.clip(first + tap, 0, n - 1)
        np.add.at(weights, (np.arange(m), column), np.where(distance <= 1, near, far))
    return weights
