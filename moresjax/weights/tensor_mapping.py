"""One of our parameters and the Hugging Face tensors it is made of, converted both ways.

Axis legend: L layers, D features in, F features out, p side of a patch.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import path_name
from moresjax.sharding.mesh import parameter_shardings

Index = tuple[slice, ...]
# Stacks of blocks in a tower, whose parameters have a leading layer axis.
STACKS = ("blocks", "last", "tail")
# A transposed matrix is copied this many columns at a time.
STRIP = 64


@runtime_checkable
class Tensor(Protocol):
    """A stored tensor, which is read where it is indexed; arrays are such too."""

    @property
    def shape(self) -> Sequence[int]:
        """The tensor's axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The type that it is stored in."""
        ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A parameter of ours and where it is in a Hugging Face model.

    Attributes:
      path: Its place in our model.
      shape: The shape of our parameter; a stacked one leads with the layers.
      names: Its tensors in the Hugging Face state dict, one per layer.
      kind: `matrix` (our kernel `[D, F]` is a weight `[F, D]`), `convolution` (our kernel
        `[p * p * 3, F]` is a weight `[F, 3, p, p]`) or `copy`.
      leading_ones: How many leading axes of size one the tensor of a `copy` has that ours has not.
      sharding: The devices that hold it; None stands for the default device.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    kind: str
    leading_ones: int = 0
    sharding: Sharding | None = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return any(stack in self.path for stack in STACKS)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's parameter."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the Hugging Face model."""
        shape = self.layer_shape
        if self.kind == "matrix":
            return shape[::-1]
        if self.kind == "convolution":
            side = math.isqrt(shape[0] // 3)
            return (shape[1], 3, side, side)
        return (1,) * self.leading_ones + shape

    def within(self, module: str, old: str = "", new: str = "") -> "TensorMapping":
        """The same parameter in a whole model.

        Args:
          module: The path of the tower or the connector in our model, such as `vision`.
          old: What its tensors' names start with alone ..
          new: .. and in the whole Hugging Face model. Names that start otherwise stay.
        """

        def renamed(name: str) -> str:
            return new + name.removeprefix(old) if name.startswith(old) else name

        names = tuple(renamed(name) for name in self.names)
        return dataclasses.replace(self, path=(*module.split("."), *self.path), names=names)

    def from_hf(self, tensor: Tensor, index: Index) -> np.ndarray:
        """The slice `index` of one layer's parameter; no more of a matrix than that is read."""
        if self.kind == "matrix":
            return tensor[index[::-1]].T
        if self.kind == "convolution":
            whole = tensor[:].transpose(2, 3, 1, 0)
            return whole.reshape(-1, whole.shape[-1])[index]
        shape = [len(range(*s.indices(n))) for s, n in zip(index, self.layer_shape, strict=True)]
        return tensor[(slice(None),) * self.leading_ones + index].reshape(shape)

    def to_hf(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The Hugging Face tensors of the whole parameter, by name; the inverse of reading it."""
        layers = array if self.stacked else [array]
        return {name: self._layer_to_hf(x) for name, x in zip(self.names, layers, strict=True)}

    def _layer_to_hf(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            return x.T
        shape = self.tensor_shape
        if self.kind == "convolution":
            return x.reshape(*shape[2:], *shape[1::-1]).transpose(3, 2, 0, 1)
        return x.reshape(shape)


def module_mappings(
    module: nnx.Module,
    name_map: Mapping[str, str],
    *,
    leading_ones: Mapping[str, int] = MappingProxyType({}),
    first: Mapping[str, int] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> list[TensorMapping]:
    """The mappings of every parameter of a tower or a connector.

    Args:
      module: Our module; shapes are enough.
      name_map: Our module paths -> Hugging Face's, see `moresjax.weights.families.base`.
      leading_ones: Tensors with leading axes of size one, and the number of these axes.
      first: The layer number of the first block, for stacks that do not start from layer 0.
      mesh: The devices to split the parameters over.
    """
    state, found = nnx.state(module, nnx.Param), []
    placed = parameter_shardings(state, mesh) if mesh else jax.tree.map(lambda _: None, state)
    where = [variable.get_value() for _, variable in nnx.to_flat_state(placed)]
    for (path, variable), sharding in zip(nnx.to_flat_state(state), where, strict=True):
        path = tuple(str(part) for part in path)
        name, kind = _hf_leaf(("blocks", *path[1:]) if path[0] in STACKS else path, name_map)
        names = (name,)
        if "{}" in name:
            start = first.get(path[0], 0)
            names = tuple(name.format(start + i) for i in range(variable.shape[0]))
        if kind == "matrix" and path[0] == "patch":
            kind = "convolution"
        ones = leading_ones.get(name, 0)
        found.append(TensorMapping(path, tuple(variable.shape), names, kind, ones, sharding))
    return found


def _hf_leaf(path: Sequence[str], name_map: Mapping[str, str]) -> tuple[str, str]:
    """Name pattern and kind of one of our parameters."""
    if name := name_map.get(".".join(path)):
        return name, "copy"
    module, leaf = name_map[".".join(path[:-1])], path[-1]
    kind = "matrix" if leaf == "kernel" else "copy"
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}", kind


def check_tensors(
    mappings: Iterable[TensorMapping],
    tensors: Mapping[str, Tensor],
    unused: Sequence[str],
    where: str,
) -> None:
    """Refuses tensors that are missing, of another shape, or unknown.

    Args:
      mappings: All parameters of the model.
      tensors: What there is, by name.
      unused: Parts of the names of tensors that may be there and make no parameter.
      where: The tensors' origin, for the message.

    Raises:
      UserError: that lists them.
    """
    wanted = {name: mapping.tensor_shape for mapping in mappings for name in mapping.names}
    missing = [name for name in wanted if name not in tensors]
    unknown = [
        name for name in tensors if name not in wanted and not any(part in name for part in unused)
    ]
    misshaped = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = []
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has misshaped", misshaped)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            faults.append(f"{what} {len(names)} tensors: {', '.join(names[:8])}{more}")
    if faults:
        raise UserError(f"{where} {'; it '.join(faults)}")


class ParameterReader(Mapping):  # without types of its items, which run-time checks would read
    """Parameters by name, in the dtype they are stored in, each read when it is asked for.

    Each process reads what its own devices hold. On a CPU the array that is read into becomes the
    parameter: nothing is copied.
    """

    def __init__(self, mappings: Iterable[TensorMapping], tensors: Mapping[str, Tensor]) -> None:
        self._mappings = {path_name(mapping.path): mapping for mapping in mappings}
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)

    def __contains__(self, name: object) -> bool:
        return name in self._mappings  # without reading it

    def __getitem__(self, name: str) -> jax.Array:
        mapping = self._mappings[name]
        shape, tensors = mapping.shape, [self._tensors[name] for name in mapping.names]
        # An encoder of which no block is used has stacks without a tensor.
        dtypes = {np.dtype(tensor.dtype) for tensor in tensors} or {np.dtype(np.float32)}
        dtype = np.result_type(*dtypes)

        def read(index: Index | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            out = _aligned([s.stop - s.start for s in index], dtype)
            if mapping.stacked:
                for place, tensor in enumerate(tensors[index[0]]):
                    _copy(mapping.from_hf(tensor, index[1:]), out[place])
            else:
                _copy(mapping.from_hf(tensors[0], index), out)
            return out

        if mapping.sharding is None:
            return jax.device_put(read(None))
        return jax.make_array_from_callback(shape, mapping.sharding, read)


def _copy(x: np.ndarray, out: np.ndarray) -> None:
    """Copies into `out`.

    Transposed matrices go in strips that stay in the processor's caches: several times as fast.
    """
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
