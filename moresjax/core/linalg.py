"""Inverses of stacks of small matrices, as matrix products and updates of rank one.

Axis legend: n rows and columns.

XLA's CPU backend gives factorisations of stacked matrices to LAPACK, in tasks on the thread pool
that the calls themselves wait in: two calls at once on two cores wait for ever (jaxlib 0.10). What
is here never leaves XLA, works on every backend, and has the derivatives of the definitions, so
that nothing is unrolled or kept for a backward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def inverse(matrix: Float[Array, "*B n n"]) -> Float[Array, "*B n n"]:
    """The inverse of matrices with a positive definite symmetric part.

    Gauss-Jordan elimination, which needs no pivots for such matrices, and a step of Newton's method
    for the rounding.
    """
    size = matrix.shape[-1]

    def eliminate(k: Array, a: Array) -> Array:
        row, column = a[..., k, :], a[..., :, k]
        pivot = row[..., k, None]
        at = jnp.arange(size) == k
        row = jnp.where(at, 1, row) / pivot
        rest = jnp.where(at, 0, a) - jnp.where(at, 0, column)[..., None] * row[..., None, :]
        return jnp.where(at[:, None], row[..., None, :], rest)

    found = jax.lax.fori_loop(0, size, eliminate, matrix)
    return 2 * found - _product(found, _product(matrix, found))


@inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    found = inverse(*primals)
    return found, -_product(found, _product(tangents[0], found))


@jax.custom_jvp
def inverse_cholesky(gram: Float[Array, "*B n n"]) -> Float[Array, "*B n n"]:
    """`L^-1`, lower triangular, of positive definite matrices `L L^T`."""
    size = gram.shape[-1]

    def eliminate(k: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = both
        below = jnp.arange(size) > k
        factor = jnp.where(below, left[..., :, k] / left[..., k, k, None], 0)[..., None]
        return left - factor * left[..., k, None, :], right - factor * right[..., k, None, :]

    eye = jnp.broadcast_to(jnp.eye(size, dtype=gram.dtype), gram.shape)
    left, right = jax.lax.fori_loop(0, size, eliminate, (gram, eye))
    pivots = jnp.diagonal(left, axis1=-2, axis2=-1)
    return right / jnp.sqrt(pivots)[..., None]


@inverse_cholesky.defjvp
def _inverse_cholesky_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    found = inverse_cholesky(*primals)
    inner = _product(found, _product(tangents[0], found.mT))
    lower = jnp.tril(inner) - 0.5 * inner * jnp.eye(inner.shape[-1])
    return found, -_product(lower, found)
