"""Building blocks shared by the vision encoder, the connector and the decoder.

Axis legend: B batch, S tokens, D features in, F features out, H head features, L layers.

Constructors describe parameters, they do not allocate them: a new module holds shapes, and
`moresjax.models.initialize` or a checkpoint fills in the values. A parameter's metadata says which
logical axes it has (`axes`; `moresjax.parallel` maps names to mesh axes) and how it starts (`std`
of a normal distribution, or a constant `fill`). Compute happens in the dtype of the activations;
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


def param(shape: tuple[int, ...], axes: tuple, **start: float) -> nnx.Param:
    """The description of a parameter; `start` is `std=` or `fill=`."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, **start)


class Linear(nnx.Module):
    """`y = x W + b` with kernel `[D, F]`, initialised with variance 1/D."""

    def __init__(self, d_in: int, d_out: int, *, axes: tuple, bias: bool = False):
        self.kernel = param((d_in, d_out), axes, std=d_in**-0.5)
        self.bias = param((d_out,), axes[1:], fill=0.0) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        y = project(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm with bias (`kind="layer"`), computed in fp32."""

    def __init__(self, dim, *, kind="rms", eps=1e-6):
        if kind not in ("rms", "layer"):
            raise ValueError(f"unknown norm {kind!r}")
        self.eps = eps
        self.scale = param((dim,), ("embed",), fill=1.0)
        self.bias = param((dim,), ("embed",), fill=0.0) if kind == "layer" else None

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

    def __init__(self, vocab: int, dim: int):
        self.table = param((vocab, dim), ("vocab", "embed"), std=0.1)

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


def stack(module: nnx.Module, layers: int) -> nnx.Module:
    """A module whose parameters have a leading layer axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), module)


def unstack(module: nnx.Module, layers: int) -> nnx.List:
    """The modules of a stack as a list."""
    return nnx.List([jax.tree.map(lambda x, i=i: x[i], module) for i in range(layers)])
