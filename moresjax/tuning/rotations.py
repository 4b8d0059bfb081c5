"""Block-diagonal rotations, for the methods that turn features instead of adding to them.

Axis legend: n blocks, b features per block.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moresjax.core.errors import UserError
from moresjax.core.linalg import inverse
from moresjax.tuning.base import Method


def skew_from_vector(vector: Float[Array, "n e"], size: int) -> Float[Array, "n b b"]:
    """Skew-symmetric matrices whose strict upper triangles are given row by row."""
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((len(vector), size, size)).at[:, rows, columns].set(vector)
    return upper - upper.mT


def skew_part(matrix: Float[Array, "... b b"]) -> Float[Array, "... b b"]:
    """The skew-symmetric part of matrices."""
    return 0.5 * (matrix - matrix.mT)


def cayley(skew: Float[Array, "... b b"]) -> Float[Array, "... b b"]:
    """The rotation `(I - Q)(I + Q)^-1` of a skew-symmetric Q, which is `2 (I + Q)^-1 - I`."""
    eye = jnp.eye(skew.shape[-1])
    return 2 * inverse(eye + skew) - eye


def cayley_neumann(skew: Float[Array, "... b b"]) -> Float[Array, "... b b"]:
    """`(I + Q)(I - Q)^-1` by its series up to Q^4: to first order the inverse of `cayley`.

    `peft` counts these as five terms; its last one is not doubled.
    """
    square = skew @ skew
    return jnp.eye(skew.shape[-1]) + 2 * (skew + square + square @ skew) + square @ square


def rotate(x: Float[Array, "*B D"], blocks: Float[Array, "n b b"]) -> Float[Array, "*B D"]:
    """`x` times the block-diagonal matrix of `blocks`."""
    parts = x.reshape(*x.shape[:-1], *blocks.shape[:2])
    return jnp.einsum("...nb,nbc->...nc", parts, blocks.astype(x.dtype)).reshape(x.shape)


def check_divides(method: Method, key: str, value: int, features: int, site: str) -> None:
    """Checks that blocks of `value` features, or `value` blocks, make up all features of a site.

    Raises:
      UserError: when they do not.
    """
    if value < 1 or features % value:
        raise UserError(f"{method.name}:{key}={value} does not divide the {features} of {site}")
