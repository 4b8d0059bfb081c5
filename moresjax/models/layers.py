"""Building blocks shared by the vision encoder, the connector and the decoder.

Axis legend: B batch, S tokens, D features in, F features out, H head features, L layers.

Parameters are `nnx.Param`s that carry the logical name of each of their axes in the metadata `axes`
(`moresjax.parallel` maps names to mesh axes). Compute happens in the dtype of the activations;
parameters are cast to it where they are used.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.ops import project

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def param(key, shape, axes, scale=0.02, dtype=jnp.float32) -> nnx.Param:
    """A normally distributed parameter with named axes."""
    return nnx.Param(scale * jax.random.normal(key, shape, dtype), axes=axes)


class Linear(nnx.Module):
    """`y = x W + b` with kernel `[D, F]`, initialised with variance 1/D."""

    def __init__(self, d_in, d_out, *, axes, bias=False, rngs: nnx.Rngs):
        self.kernel = param(rngs.params(), (d_in, d_out), axes, d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        y = project(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm with bias (`kind="layer"`), computed in fp32."""

    def __init__(self, dim, *, kind="rms", eps=1e-6):
        if kind not in ("rms", "layer"):
            raise ValueError(f"unknown norm {kind!r}")
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding table `[V, D]`."""

    def __init__(self, vocab, dim, *, rngs: nnx.Rngs):
        self.table = param(rngs.params(), (vocab, dim), ("vocab", "embed"), 0.1)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.table[...][tokens]


def rope_table(
    positions: Int[Array, "B S"], dim: int, theta: float, length: int
) -> tuple[Float[Array, "B 1 S H2"], Float[Array, "B 1 S H2"]]:
    """Cosines and sines of the rotary embedding for the first `dim` features of a head.

    They are looked up in a constant table of `length` positions: computed in the program, XLA would
    fuse, and so repeat, the trigonometry at every layer's every use.
    """
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency.astype(np.float32)
    cos, sin = jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))
    return cos[positions][:, None], sin[positions][:, None]


def apply_rope(x: Float[Array, "B N S H"], rope) -> Float[Array, "B N S H"]:
    """Rotates pairs (i, i + dim/2); features beyond the table's `dim` pass unchanged."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters have a leading axis of `layers` independent initialisations."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def unstack(module: nnx.Module, layers: int) -> nnx.List:
    """The modules of a stack as a list."""
    return nnx.List([jax.tree.map(lambda x, i=i: x[i], module) for i in range(layers)])
