"""Array operations that every package may use."""

from jaxtyping import Array, Float


def project(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel` as one matrix product.

    XLA's CPU backend is several times slower at the weight gradient of a product that contracts
    over two axes, so the leading axes are folded first.
    """
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
