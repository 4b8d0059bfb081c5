"""TPU chips and slices: what a plan compares a program with.

Sizes, bandwidths and FLOP/s are Google Cloud's, from the page of each version
(cloud.google.com/tpu/docs/v4 to v6e). Bandwidth between chips is that of one link, both directions
together, from the table of chips in "How to Scale Your Model" (jax-ml.github.io/scaling-book).
"""

import dataclasses
import math
import os

import jax
from jax.experimental import topologies

from moresjax.core.errors import UserError, choice_error


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      hbm_bytes: bytes of memory.
      hbm_bandwidth: bytes per second to and from the memory.
      flops: bf16 operations per second.
      ici_bandwidth: bytes per second of one link to a neighbour, both directions together.
      compiler_name: what libtpu calls it.
      ndim: dimensions of the torus of chips.
    """

    hbm_bytes: int
    hbm_bandwidth: float
    flops: float
    ici_bandwidth: float
    compiler_name: str
    ndim: int


GIB = 2**30
CHIPS = {
    "v4": Chip(32 * GIB, 1.228e12, 2.75e14, 9e10, "v4", 3),
    "v5e": Chip(16 * GIB, 8.19e11, 1.97e14, 9e10, "v5e", 2),
    "v5p": Chip(95 * GIB, 2.765e12, 4.59e14, 1.8e11, "v5", 3),
    "v6e": Chip(32 * GIB, 1.64e12, 9.18e14, 1.8e11, "v6e", 2),
}
# Google names a slice by its chips (v5e, v6e) or by its cores (v4, v5p: two a chip).
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
# What JAX calls them (`device_kind`).
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
# libtpu would otherwise ask the cloud which TPU this machine is, and serve one process only.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """Chips that are wired together, such as `v5e` of shape `(4, 4)`."""

    chip_name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The kind of its chips."""
        return CHIPS[self.chip_name]

    @property
    def size(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Its name, such as `v5e:4x4`."""
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second of a chip over one link in every direction that has neighbours."""
        return self.chip.ici_bandwidth * max(sum(n > 1 for n in self.shape), 1)

    def devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        """Devices to compile for, which need not exist.

        Raises:
          UserError: when libtpu, which holds the compiler, is not installed or refuses the shape.
        """
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
        shape = "x".join(map(str, self.shape))
        host = [min(n, most) for n, most in zip((*self.shape, 1)[:3], (2, 2, 1), strict=True)]
        try:
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.compiler_name}:{shape}",
                chips_per_host_bounds=host,
                # The two cores of a chip of a 3D torus work as one device.
                chip_config_name="megacore" if self.chip.ndim == 3 else "default",
            )
        except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot compile for {self.name} (pip install 'moresjax[tpu]'): {reason}"
            ) from None
        return list(found.devices)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device; None for one that is not in the table (CPU, GPU)."""
    return CHIPS.get(_KINDS.get(device_kind, ""))


def find_slice(name: str) -> TpuSlice:
    """A slice by Google's name (`v5e-8`, `v5p-8`: four chips) or by its shape (`v5e:2x4`).

    >>> find_slice("v5e-8").shape
    (2, 4)

    Raises:
      UserError: for an unknown chip, size or shape.
    """
    chip, separator, rest = name.partition(":") if ":" in name else name.partition("-")
    if chip not in CHIPS:
        raise choice_error("TPU", chip, CHIPS)
    ndim = CHIPS[chip].ndim
    if separator != ":":
        sizes = _FLAT if ndim == 2 else _CUBE
        if not rest.isdigit() or int(rest) not in sizes:
            raise choice_error("slice", name, [f"{chip}-{size}" for size in sizes])
        rest = sizes[int(rest)]
    shape = rest.split("x")
    if len(shape) != ndim or not all(n.isdigit() and int(n) for n in shape):
        example = _FLAT[8] if ndim == 2 else _CUBE[8]
        raise UserError(f"the shape of a {chip} slice looks like {chip}:{example}, got {name!r}")
    return TpuSlice(chip, tuple(map(int, shape)))
