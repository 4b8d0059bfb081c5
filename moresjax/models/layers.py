"""Building blocks shared by the vision encoder, the connector and the decoder.

Axis legend: B batch, S tokens, D features in, F features out, H head features, L layers.

Constructors describe parameters, they do not allocate them: a new module holds shapes, and
`moresjax.models.initialize` or a checkpoint fills in the values. A parameter's metadata says which
logical axes it has (`axes`; `moresjax.sharding` maps names to mesh axes) and how it starts (`std`
of a normal distribution, or a constant `fill`). Compute happens in the dtype of the activations;
parameters are cast to it where they are used.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moresjax.core.errors import choice_error
from moresjax.core.ops import project

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

NORMS = ("rms", "layer")
# Dtypes that activations may have.
DTYPES = ("float32", "bfloat16", "float16")
ROPE_SCALINGS = ("default", "linear", "llama3")
# Cosines and sines of the rotary embedding, one row per token.
Rope = tuple[Float[Array, "B 1 S H2"], Float[Array, "B 1 S H2"]]
Module = TypeVar("Module", bound=nnx.Module)


def param(
    shape: tuple[int, ...], axes: tuple, *, dtype: DTypeLike = jnp.float32, **start: Any
) -> nnx.Param:
    """The description of a parameter that has no value yet.

    Args:
      shape: Its shape.
      axes: The names of its axes, by which it is split over devices; None for an axis that is not.
      dtype: Its dtype.
      start: Its initial value: `std=` of a normal distribution, `fill=` with a constant, or
        `derived=True` when it is computed from another parameter.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, **start)


class Linear(nnx.Module):
    """`y = x W + b` with kernel `[D, F]`, initialised with variance 1/D.

    With `int8` the kernel holds whole numbers, and `scale` one factor per output feature.
    """

    def __init__(
        self, d_in: int, d_out: int, *, axes: tuple, bias: bool = False, int8: bool = False
    ) -> None:
        dtype = jnp.int8 if int8 else jnp.float32
        self.kernel = param((d_in, d_out), axes, dtype=dtype, std=d_in**-0.5)
        self.scale = param((d_out,), axes[1:], derived=True) if int8 else None
        self.bias = param((d_out,), axes[1:], fill=0.0) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """`x W + b`."""
        y = project(x, self.kernel[...].astype(x.dtype))
        if self.scale is not None:
            y = (y * self.scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def dense(self) -> Float[Array, "*L D F"]:
        """W, whatever it is stored as."""
        kernel = self.kernel[...]
        return kernel if self.scale is None else kernel * self.scale[...][..., None, :]


class Norm(nnx.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm with bias (`kind="layer"`), computed in fp32.

    The normalised features are multiplied by `offset + scale`.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: str = "rms",
        eps: float = 1e-6,
        offset: float = 0.0,
        axes: tuple = ("embed",),
    ) -> None:
        if kind not in NORMS:
            raise choice_error("norm", kind, NORMS)
        self.eps, self.offset = eps, offset
        self.scale = param((dim,), axes, fill=1.0 - offset)
        self.bias = param((dim,), axes, fill=0.0) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The normalised features, in the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        y = y * (scale + self.offset if self.offset else scale)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding table `[V, D]`."""

    def __init__(self, vocab: int, dim: int) -> None:
        self.table = param((vocab, dim), ("vocab", "embed"), std=0.1)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The rows of the table at these token ids."""
        return self.table[...][tokens]


def scale_frequencies(
    frequency: Float[np.ndarray, "H2"],
    kind: str,
    factor: float,
    low_turns: float,
    high_turns: float,
    length: int,
) -> Float[np.ndarray, "H2"]:
    """Rotary frequencies stretched to a longer context by `factor`.

    `linear` divides all of them. `llama3` divides those that make fewer than `low_turns` turns in
    the `length` positions of pretraining, keeps those that make more than `high_turns`, and
    interpolates between.
    """
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / np.float32(factor)
    if kind == "llama3":
        turns = length * frequency / (2 * np.pi)
        kept = np.clip((turns - low_turns) / (high_turns - low_turns), 0, 1)
        return (frequency * (kept + (1 - kept) / factor)).astype(np.float32)
    raise choice_error("rope scaling", kind, ROPE_SCALINGS)


def rope_frequencies(dim: int, theta: float) -> Float[np.ndarray, "H2"]:
    """Radians per position of the `dim / 2` rotated pairs of features."""
    return (theta ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def rope_table(
    positions: Int[Array, "B S"], frequency: Float[np.ndarray, "H2"], length: int
) -> tuple[Float[Array, "B 1 S H2"], Float[Array, "B 1 S H2"]]:
    """Cosines and sines of the rotary embedding for the first `2 * H2` features of a head.

    They are looked up in a constant table of `length` positions: computed in the program, XLA would
    fuse, and so repeat, the trigonometry at every layer's every use.
    """
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    cos, sin = jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))
    return cos[positions][:, None], sin[positions][:, None]


def apply_rope(x: Float[Array, "B N S H"], rope: Rope) -> Float[Array, "B N S H"]:
    """Rotates pairs (i, i + dim/2); features beyond the table's `dim` pass unchanged."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def stack(module: Module, layers: int) -> Module:
    """A module whose parameters have a leading layer axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), module)


def unstack(module: nnx.Module, layers: int) -> nnx.List:
    """The modules of a stack as a list; without values where the stack has none."""
    return split_layers(*jax.tree.flatten(module), layers)


def split_layers(leaves: list, tree: Any, layers: int) -> nnx.List:
    """`unstack` of a flattened module.

    Empties `leaves` one by one: where nobody else owns them, there is never more than one of them
    in memory twice.
    """
    own: list[list] = [[] for _ in range(layers)]
    while leaves:
        x = leaves.pop(0)
        for number, mine in enumerate(own):
            mine.append(_layer(x, number))
    return nnx.List([tree.unflatten(mine) for mine in own])


def join_layers(each: Sequence[list], tree: Any) -> nnx.Module:
    """The stack of flattened modules, whose leaves are taken out one by one."""
    return tree.unflatten([jnp.stack([own.pop(0) for own in each]) for _ in range(len(each[0]))])


def _layer(x: Array | jax.ShapeDtypeStruct, number: int) -> Array | jax.ShapeDtypeStruct:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[number]
    sharding = x.sharding and NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
