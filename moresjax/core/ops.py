"""Array operations that every package may use."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moresjax.core.types import AnyArray


def project(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel` as one matrix product.

    XLA's CPU backend is several times slower at the weight gradient of a product that contracts
    over two axes, so the leading axes are folded first.
    """
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def pick(
    x: Shaped[AnyArray, "B *S"], index: Int[AnyArray, "B Q"], axis: int = 1
) -> Shaped[Array, "B *Q"]:
    """The tokens of every row at its own places `index`, tokens being on `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(index).reshape(shape), axis=axis)


def write_at(
    buffer: Shaped[AnyArray, "B *T"],
    new: Shaped[AnyArray, "B *S"],
    index: Int[AnyArray, "..."] | int,
    axis: int,
) -> Shaped[Array, "B *T"]:
    """`buffer` with `new` written along `axis` from `index` on: one for all rows, or `[B]`."""
    new = new.astype(buffer.dtype)
    if not getattr(index, "ndim", 0):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis)
    row = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(row)(buffer, new, index)
