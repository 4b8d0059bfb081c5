"""Attention by kernels that never write the logits to memory, and when they are used.

Axis legend: B batch, N query heads, K key/value heads, Q queries, S keys, H head features, F
features of the values.

| `attention` | platform of `auto` | batches that hold | needs |
|---|---|---|---|
| `splash` | TPU | `SINGLE`, `PACKED` | 128 tokens per row |
| `cudnn` | NVIDIA GPU | `SINGLE` | 16 bits; heads of 8, 16 .. 128 features; no soft cap |

Probes leave the kernel on (`group_attention`), and so do virtual tokens before rows of one
document. A chosen kernel that cannot say what rows see (branches, padding on the left, virtual
tokens that all documents of packed rows see, images whose tokens see each other, with cuDNN packed
rows too) is left with a line in the log; such rows are read by `attention="chunked"`: plain XLA,
some queries at a time where there are more than `attention.PAIRS` pairs. Decoding, vision encoders
and `xla`, which is the `auto` of CPUs, have `moresjax.models.attention` over a dense mask.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import Batch, LazyMask, RowStructure, TokenLayout, valid_mask
from moresjax.core.types import pytree_dataclass
from moresjax.sharding.mesh import BATCH_AXES, batch_shards

log = logging.getLogger(__name__)

KERNELS = ("auto", "xla", "splash", "cudnn", "chunked")
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
      run: The number of every key's run, -1 for padding. The queries are the last of the keys.
      kernel: `splash` or `cudnn` (static).
      first: The column of the first query among the keys (static).
      behind_cache: Whether the keys are those of a cache and, once more, the queries' own (static).
      window: only so many tokens up to itself; 0: all of them (static).
      local: whether this layer has the window, where only a number in a scan tells; None: it has.
    """

    run: Int[Array, "B S"]
    kernel: str = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    local: Bool[Array, ""] | None = None
    first: int = dataclasses.field(default=0, metadata={"static": True})
    behind_cache: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and keys."""
        return self.run.shape


def visible_runs(
    batch: Batch,
    config: FusedConfig,
    full: TokenLayout | None = None,
    first: int = 0,
    *,
    gaps: bool = False,
) -> Runs | None:
    """What the tokens of a batch see, if there is a kernel for it.

    Where there is none although the rows are long enough for one, a line in the log says why.

    Args:
      batch: A batch.
      config: The configuration of the LLM (`models.decoder.DecoderConfig`).
      full: The layout of all keys, with the virtual tokens before the rows; default: there are
        none.
      first: The column of the first query in it.
      gaps: Whether rows may lack some of the virtual tokens.
    """
    kernel = kernel_for(config)
    if kernel not in ("splash", "cudnn") or (batch.layout.shape[1] < LANES and kernel == "splash"):
        return None
    virtual = 0 if full is None else full.shape[1] - batch.layout.shape[1]
    reason = _unfit(kernel, batch.structure, config, bool(virtual), gaps)
    if full is not None and full.whole_images:
        reason = "images whose tokens see each other"
    if reason:
        log_fallback(kernel, reason)
        return None
    if full is None or not virtual:
        return Runs(jnp.where(valid_mask(batch.layout), batch.layout.document, -1), kernel)
    # Of one document, which virtual tokens belong to.
    return Runs(jnp.where(valid_mask(full), 0, -1), kernel, first=first)


def chunk_runs(batch: Batch, seen: LazyMask, config: FusedConfig) -> Runs | None:
    """What tokens see that are read when a cache holds those before them, if a kernel can say it.

    Where the queries begin is data, and the kernel's mask is not. So the queries' own keys come
    once more behind all places of the cache, whose later places belong to no run.

    Args:
      batch: A batch.
      seen: What the queries see; their columns are the same in all rows.
      config: The configuration of the LLM.
    """
    kernel, (_, count, keys) = kernel_for(config), seen.shape
    if kernel not in ("splash", "cudnn") or count < LANES:
        return None
    reason = "chunked prefill" if kernel == "cudnn" else ""
    if batch.structure != RowStructure.SINGLE or getattr(config, "window", 0):
        reason = "chunked prefill of rows with padding between, branches or sliding windows"
    if reason:
        log_fallback(kernel, reason)
        return None
    run = jnp.where(valid_mask(seen.layout), 0, -1)
    queries = jnp.asarray(seen.queries)
    cached = jnp.where(jnp.arange(keys) < queries[:, :1], run, -1)
    run = jnp.concatenate([cached, jnp.take_along_axis(run, queries, axis=1)], axis=1)
    return Runs(run, kernel, first=keys, behind_cache=True)


def _unfit(
    kernel: str, structure: RowStructure, config: FusedConfig, virtual: bool, gaps: bool
) -> str:
    """Why a kernel cannot say what the rows see; empty if it can."""
    if structure == RowStructure.ANY:
        return "rows that may have branches or padding on the left"
    if structure == RowStructure.PACKED and kernel == "cudnn":
        return "packed rows"
    if structure == RowStructure.PACKED and virtual:
        return "virtual tokens that all documents of packed rows see"
    if gaps and (kernel == "cudnn" or getattr(config, "window", 0)):
        return "rows with different numbers of virtual tokens"
    if kernel == "splash":
        return ""
    if config.dtype not in ("bfloat16", "float16"):
        return f"activations in {config.dtype}"
    if config.head_dim % 8 or config.head_dim > CUDNN_HEAD:
        return f"heads of {config.head_dim} features"
    return "a soft cap on attention logits" if config.attention_softcap else ""


@functools.cache
def log_fallback(kernel: str, reason: str) -> None:
    """Says once that something is read without the kernel that was chosen."""
    log.warning("attention without the %s kernel: %s", kernel, reason)


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
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S F"],
    runs: Runs,
    softcap: float = 0.0,
) -> Float[Array, "B N Q F"]:
    """Attention within runs; what comes out for padding means nothing."""

    def attend(window: int) -> Callable[..., Array]:
        if runs.kernel == "cudnn":
            return functools.partial(_cudnn, window, runs.first)
        kernel = functools.partial(_splash, window, softcap, runs.first)
        return functools.partial(_on_each_device, kernel)

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


def _splash(
    window: int, softcap: float, first: int, q: Array, k: Array, v: Array, run: Array
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, queries, dim = q.shape[1:]
    keys = k.shape[2]

    def lengthened(x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, -length % LANES), (0, 0)))

    def numbers(run: Array) -> Array:
        return jnp.pad(run, ((0, 0), (0, -run.shape[1] % LANES)), constant_values=-1)

    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = lengthened(q, queries), lengthened(k, keys), lengthened(v, keys)
    ids = splash.SegmentIds(numbers(run[:, first:]), numbers(run))
    # Keys before a query (all of them, or a window) and none after it.
    size = q.shape[2], k.shape[2]
    seen = splash.LocalMask(size, (window - 1 if window else None, 0), first)
    block_q, block_kv = (next(b for b in BLOCKS if length % b == 0) for length in size)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=_platform() == "cpu",  # emulated
    )
    return jnp.asarray(jax.vmap(kernel)(q, k, v, ids))[:, :, :queries]


def _cudnn(window: int, first: int, q: Array, k: Array, v: Array, run: Array) -> Array:
    """Causal attention.

    With one document per row and padding on the right, no token sees what it should not, but for
    padding. Keys before the first query get a query each, which nobody reads; values as wide as the
    keys are all that the kernel takes.
    """
    del run
    dim, width, keys = k.shape[3], v.shape[3], k.shape[2]
    odd = keys % 2  # the backward pass wants an even number of tokens
    q = jnp.pad(q, ((0, 0), (0, 0), (first, odd), (0, 0)))
    k = jnp.pad(k, ((0, 0), (0, 0), (0, odd), (0, 0)))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, odd), (0, -width % dim)))
    near = (window - 1, 0) if window else None
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    parts = [
        jax.nn.dot_product_attention(
            q,
            k,
            v[..., start : start + dim].swapaxes(1, 2),
            is_causal=True,
            local_window_size=near,
            implementation="cudnn",
        )
        for start in range(0, width, dim)
    ]
    y = jnp.concatenate(parts, axis=3) if len(parts) > 1 else parts[0]
    return y.swapaxes(1, 2)[:, :, first:keys, :width]
