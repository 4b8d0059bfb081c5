"""Attention by kernels that never write the logits to memory, and when they are used.

Axis legend: B batch, N query heads, K key/value heads, S tokens, H head features.

| `attention` | platform of `auto` | batches that hold | needs |
|---|---|---|---|
| `splash` | TPU | `SINGLE`, `PACKED` | 128 tokens per row |
| `cudnn` | NVIDIA GPU | `SINGLE` | 16 bits; heads of 8, 16 .. 128 features; no soft cap |

Everything else (other batches, probes, learned keys, decoding, vision encoders, CPUs) is
`moresjax.models.attention` over a dense mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import Batch, RowStructure, valid_mask
from moresjax.core.types import pytree_dataclass
from moresjax.sharding.mesh import BATCH_AXES, batch_shards

KERNELS = ("auto", "xla", "splash", "cudnn")
LANES = 128  # splash works on blocks of multiples of it, so shorter rows gain nothing
BLOCKS = (512, 384, 256, 128)
CUDNN_HEAD = 128  # features; newer GPUs take more


@runtime_checkable
class FusedConfig(Protocol):
    """What the choice of a kernel depends on (`models.decoder.DecoderConfig`)."""

    @property
    def attention(self) -> str:
        """One of `KERNELS`."""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the activations."""
        ...

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        ...

    @property
    def attention_softcap(self) -> float:
        """The soft cap on the logits; 0: none."""
        ...


@pytree_dataclass
class Runs:
    """What a fused kernel takes instead of a dense mask: a query sees its run up to itself.

    Attributes:
      run: number of every token's run, -1 for padding.
      kernel: `splash` or `cudnn` (static).
      window: only so many tokens up to itself; 0: all of them (static).
      local: whether this layer has the window, where only a number in a scan tells; None: it has.
    """

    run: Int[Array, "B S"]
    kernel: str = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    local: Bool[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and tokens."""
        return self.run.shape


def visible_runs(batch: Batch, config: FusedConfig) -> Runs | None:
    """What the tokens of a batch see, if there is a kernel for it.

    Args:
      batch: A batch without virtual tokens before its rows.
      config: The configuration of the LLM (`models.decoder.DecoderConfig`).
    """
    kernel = kernel_for(config)
    fits = {
        "xla": False,
        "splash": batch.structure != RowStructure.ANY and batch.layout.shape[1] >= LANES,
        "cudnn": batch.structure == RowStructure.SINGLE
        and config.dtype in ("bfloat16", "float16")
        and config.head_dim % 8 == 0
        and config.head_dim <= CUDNN_HEAD
        and not config.attention_softcap,
    }
    if not fits[kernel]:
        return None
    return Runs(jnp.where(valid_mask(batch.layout), batch.layout.document, -1), kernel)


def kernel_for(config: FusedConfig) -> str:
    """The kernel that a `DecoderConfig` asks for, `xla` being none."""
    return _kernel_here() if config.attention == "auto" else config.attention


def _kernel_here() -> str:
    """The kernel of the devices that the program is traced for.

    These are the devices of the mesh in use, which need not be there, else the default one.
    """
    platform = _platform()
    if platform == "tpu":
        # Without a mesh nobody says how arrays are split over several devices.
        known = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
        return "splash" if known else "xla"
    if platform == "gpu":
        major = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")[0]
        return "cudnn" if major.isdigit() and int(major) >= 8 else "xla"
    return "xla"


def _platform() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def fused_attention(
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    softcap: float = 0.0,
) -> Float[Array, "B N S H"]:
    """Attention within runs; what comes out for padding means nothing."""

    def attend(window: int) -> Callable[..., Array]:
        if runs.kernel == "cudnn":
            return functools.partial(_cudnn, window)
        return functools.partial(_on_each_device, functools.partial(_splash, window, softcap))

    if runs.local is None:
        return attend(runs.window)(q, k, v, runs.run)
    # A window is part of the kernel.
    return jax.lax.cond(runs.local, attend(runs.window), attend(0), q, k, v, runs.run)


def _on_each_device(
    function: Callable[..., Array], q: Array, k: Array, v: Array, run: Array
) -> Array:
    """The function of every device's rows and heads: XLA cannot split a TPU kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, k, v, run)
    rows = None if q.shape[0] % batch_shards(mesh) else BATCH_AXES
    heads = None if k.shape[1] % mesh.shape["tensor"] else "tensor"
    spec = PartitionSpec(rows, heads)
    specs = (spec, spec, spec, PartitionSpec(rows))
    return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, run)


def _splash(window: int, softcap: float, q: Array, k: Array, v: Array, run: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, length, dim = q.shape[1:]
    missing = -length % LANES
    size = length + missing

    def lengthened(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))

    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)  # the kernel does not scale
    run = jnp.pad(run, ((0, 0), (0, missing)), constant_values=-1)
    # Keys before a query (all of them, or a window) and none after it.
    seen = splash.LocalMask((size, size), (window - 1 if window else None, 0), 0)
    block = next(block for block in BLOCKS if size % block == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=_platform() == "cpu",  # emulated
    )
    y = jax.vmap(kernel)(*map(lengthened, (q, k, v)), splash.SegmentIds(run, run))
    return jnp.asarray(y)[:, :, :length]


def _cudnn(window: int, q: Array, k: Array, v: Array, run: Array) -> Array:
    """Causal attention.

    With one document per row and padding on the right, no token sees what it should not, but for
    padding.
    """
    del run
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    near = (window - 1, 0) if window else None
    y = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=near, implementation="cudnn"
    )
    return y.swapaxes(1, 2)
