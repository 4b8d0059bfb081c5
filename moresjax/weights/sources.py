"""One parameter of ours in a Hugging Face model: its tensors, and the way there and back.

Axis legend: L layers, D features in, F features out, p side of a patch.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import path_name
from moresjax.sharding.mesh import parameter_shardings
from moresjax.weights.tables import BATCHED

Path_ = tuple[str, ...]
Index = tuple[slice, ...]
# Parts of a tower that are blocks with a leading layer axis.
STACKS = ("blocks", "last", "tail")
# Columns of a transposed matrix that are copied at a time.
STRIP = 64


@runtime_checkable
class Tensor(Protocol):
    """A stored tensor, read where it is indexed; arrays are such."""

    shape: Sequence[int]
    dtype: np.dtype

    def __getitem__(self, index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter of ours and where it is in a Hugging Face model.

    Attributes:
      path: in our model.
      shape: of our parameter; a stacked one leads with the layers.
      names: of its tensors in the state dict, one per layer.
      kind: `matrix` (kernel `[D, F]` of a weight `[F, D]`), `convolution` (kernel `[p * p * 3, F]`
        of a weight `[F, 3, p, p]`) or `copy`.
      ones: leading axes of size one that the tensor of a `copy` has and ours has not.
      sharding: where it goes; None: to the default device.
    """

    path: Path_
    shape: tuple[int, ...]
    names: tuple[str, ...]
    kind: str
    ones: int = 0
    sharding: Sharding | None = None

    @property
    def stacked(self) -> bool:
        return any(stack in self.path for stack in STACKS)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the Hugging Face model."""
        own = self._own
        if self.kind == "matrix":
            return own[::-1]
        if self.kind == "convolution":
            side = math.isqrt(own[0] // 3)
            return (own[1], 3, side, side)
        return (1,) * self.ones + own

    def under(self, part: str, old: str = "", new: str = "") -> "Source":
        """The same within a whole model: in `part`, the prefix `old` of its names become `new`."""

        def renamed(name: str) -> str:
            return new + name.removeprefix(old) if name.startswith(old) else name

        names = tuple(renamed(name) for name in self.names)
        return dataclasses.replace(self, path=(*part.split("."), *self.path), names=names)

    def to_ours(self, tensor: Tensor, index: Index) -> np.ndarray:
        """The part `index` of one layer's parameter; only that part of a matrix is read."""
        if self.kind == "matrix":
            return tensor[index[::-1]].T
        if self.kind == "convolution":
            whole = tensor[:].transpose(2, 3, 1, 0)
            return whole.reshape(-1, whole.shape[-1])[index]
        return tensor[(slice(None),) * self.ones + index].reshape(
            [len(range(*part.indices(n))) for part, n in zip(index, self._own, strict=True)]
        )

    @property
    def _own(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    def to_tensors(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of the whole parameter, by name; the inverse of reading it."""
        layers = array if self.stacked else [array]
        return {name: self._to_hf(x) for name, x in zip(self.names, layers, strict=True)}

    def _to_hf(self, own: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            return own.T
        shape = self.tensor_shape
        if self.kind == "convolution":
            return own.reshape(*shape[2:], *shape[1::-1]).transpose(3, 2, 0, 1)
        return own.reshape(shape)


def module_sources(
    module: nnx.Module,
    table: Mapping[str, str],
    *,
    first: Mapping[str, int] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> list[Source]:
    """The sources of every parameter of a tower or a connector.

    Args:
      module: ours; shapes are enough.
      table: of `moresjax.weights.tables`.
      first: layer number of the first block of stacks that do not start from layer 0.
      mesh: devices to split the parameters over.
    """
    state, found = nnx.state(module, nnx.Param), []
    placed = parameter_shardings(state, mesh) if mesh else jax.tree.map(lambda _: None, state)
    where = [variable.get_value() for _, variable in nnx.to_flat_state(placed)]
    for (path, variable), sharding in zip(nnx.to_flat_state(state), where, strict=True):
        path = tuple(str(part) for part in path)
        name, kind = _hf_leaf(("blocks", *path[1:]) if path[0] in STACKS else path, table)
        names = (name,)
        if "{}" in name:
            start = first.get(path[0], 0)
            names = tuple(name.format(start + i) for i in range(variable.shape[0]))
        if kind == "matrix" and path[0] == "patch":
            kind = "convolution"
        ones = BATCHED.get(name, 0)
        found.append(Source(path, tuple(variable.shape), names, kind, ones, sharding))
    return found


def _hf_leaf(path: Path_, table: Mapping[str, str]) -> tuple[str, str]:
    """Name pattern and kind of one of our parameters."""
    if name := table.get(".".join(path)):
        return name, "copy"
    module, leaf = table[".".join(path[:-1])], path[-1]
    kind = "matrix" if leaf == "kernel" else "copy"
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}", kind


def check_tensors(
    sources: Iterable[Source], tensors: Mapping[str, Tensor], unused: Sequence[str], where: str
) -> None:
    """Refuses tensors that are missing, of another shape, or unknown.

    Args:
      unused: what a name may contain that nothing of ours needs.

    Raises:
      UserError: that lists them.
    """
    wanted = {name: source.tensor_shape for source in sources for name in source.names}
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted and not _any_in(unused, name)]
    shaped = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = []
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has misshaped", shaped)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            faults.append(f"{what} {len(names)} tensors: {', '.join(names[:8])}{more}")
    if faults:
        raise UserError(f"{where} {'; it '.join(faults)}")


def _any_in(parts: Sequence[str], name: str) -> bool:
    return any(part in name for part in parts)


class ParameterReader(Mapping):
    """Parameters by name, in the dtype they are stored in, each read when it is asked for.

    Each process reads what its own devices hold. On a CPU the array that is read into becomes the
    parameter: nothing is copied.
    """

    def __init__(self, sources: Iterable[Source], tensors: Mapping[str, Tensor]):
        self._sources = {path_name(source.path): source for source in sources}
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name) -> bool:
        return name in self._sources  # without reading it

    def __getitem__(self, name: str) -> jax.Array:
        source = self._sources[name]
        shape, tensors = source.shape, [self._tensors[name] for name in source.names]
        dtype = np.result_type(*{np.dtype(tensor.dtype) for tensor in tensors})

        def read(index: Index) -> np.ndarray:
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            part = _aligned([s.stop - s.start for s in index], dtype)
            if source.stacked:
                for place, tensor in enumerate(tensors[index[0]]):
                    _copy(source.to_ours(tensor, index[1:]), part[place])
            else:
                _copy(source.to_ours(tensors[0], index), part)
            return part

        if source.sharding is None:
            return jax.device_put(read((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, source.sharding, read)


def _copy(x: np.ndarray, out: np.ndarray) -> None:
    """Copies into `out`; transposed matrices in strips that stay in the processor's caches, which
    is several times faster."""
    width = STRIP if x.ndim == 2 and x.strides[0] < x.strides[1] else max(x.shape[-1], 1)
    for start in range(0, x.shape[-1], width):
        out[..., start : start + width] = x[..., start : start + width]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array without contents whose address suits the devices' allocator."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def stored_dtype(name: str) -> np.dtype:
    """The numpy type of a dtype that safetensors names, such as `BF16`."""
    special = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "BOOL": bool}
    kinds = {"F": "f", "I": "i", "U": "u"}
    if name in special:
        return np.dtype(special[name])
    return np.dtype(f"{kinds[name[0]]}{int(name[1:]) // 8}")
