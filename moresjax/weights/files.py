"""Tensors in the files of a folder: safetensors, and pickles when they are allowed."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from moresjax.core.errors import UserError
from moresjax.weights.families.base import MLLM_FAMILIES, VISION_FAMILIES, renamed
from moresjax.weights.families.tinyllava import STAGE_FOLDERS
from moresjax.weights.tensor_mapping import Tensor, stored_dtype

# Files of weights in a folder of `transformers`; an index of several has `.index.json` after it.
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, or rows of one; indexing reads only what is asked for."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    first_row: int = 0

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        rows, *others = index if isinstance(index, tuple) else (index,)
        start, stop, _ = rows.indices(self.shape[0])
        # Opened anew every time: pages of an open file would count as resident memory.
        with safe_open(self.file, framework="numpy") as tensors:
            stored = tensors.get_slice(self.name)
            return stored[(slice(self.first_row + start, self.first_row + stop), *others)]


def open_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a folder by their names in the state dict of `transformers`, unread.

    Args:
      folder: A folder with `model.safetensors` or an index of several files, or with TinyLLaVA
        Factory's folders that have one of them. Other files are not read.
      allow_pickle: Whether torch may read `pytorch_model.bin` (weights only) where there are no
        safetensors.

    Raises:
      UserError: when there is no file that may be read, or one cannot be.
    """
    stages = {prefix: folder / name for name, prefix in STAGE_FOLDERS.items()}
    whole = not all(stage.is_dir() for stage in stages.values())
    found: dict[str, Tensor] = {}
    for prefix, place in ({"": folder} if whole else stages).items():
        for name, tensor in _stored(place, allow_pickle).items():
            found[state_dict_name(prefix + name)] = tensor
    return separated(found)


def stored_in(
    file: Path, *, inside: str = "", allow_pickle: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one file by their names in it, unread.

    Args:
      file: Safetensors, or a pickle of torch.
      inside: The key of a pickle under which they are where it has one.
      allow_pickle: Whether torch may read a pickle (weights only).

    Returns:
      The tensors, and what else a pickle has beside those `inside`.

    Raises:
      UserError: The file is not there, may not be read, or cannot be.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file")
    if file.suffix == ".safetensors":
        return _safetensors(file), {}
    if not allow_pickle:
        raise pickle_error(f"{file} is pickled")
    content = unpickled(file)
    if isinstance(content, Mapping) and isinstance(content.get(inside), Mapping):
        rest = {key: x for key, x in content.items() if key != inside}
        return _arrays(content[inside], file), rest
    return _arrays(content, file), {}


def pickle_error(what: str) -> UserError:
    """`UserError` for a pickle that may not be read; `what` says which."""
    return UserError(
        f"{what}, and pickles run code; allow it with --allow-pickle if you trust its source"
    )


def _stored(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if found := _named_files(folder, SAFETENSORS, _safetensors):
        return found
    pickle = next((folder / name for name in _names(PICKLE) if (folder / name).is_file()), None)
    if pickle is None:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        beside = f"; {', '.join(others[:4])} is no name that transformers reads" if others else ""
        raise UserError(f"{folder} has no {' and no '.join(_names(SAFETENSORS))}{beside}")
    if not allow_pickle:
        raise pickle_error(f"{folder} has only pickled weights ({pickle.name})")
    return _named_files(folder, PICKLE, read_pickle)


def _names(file: str) -> tuple[str, str]:
    """The two names that `transformers` looks for, in its order: one file, the index of several."""
    return file, f"{file}.index.json"


def _named_files(
    folder: Path, file: str, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of the file of that name, or of those that its index names; nothing without."""
    single, index = (folder / name for name in _names(file))
    if single.is_file():
        return read(single)
    if not index.is_file():
        return {}
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        files = {name: folder / name for name in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be used: {error!r}") from None
    for name, shard in files.items():
        if Path(name).name != name or not shard.is_file():
            raise UserError(f"{index} names {name}, which is not in the folder")
    shards = {name: read(shard) for name, shard in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise UserError(f"{index} says that {tensor} is in {name}, but it is not")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    found = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                stored = tensors.get_slice(name)
                dtype = stored_dtype(stored.get_dtype())
                found[name] = StoredTensor(file, name, tuple(stored.get_shape()), dtype)
    except Exception as error:  # of the reader's own kind
        raise UserError(f"{file} cannot be read: {error}") from None
    return found


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `*.bin` file, which torch reads without running what is in it.

    Raises:
      UserError: It cannot be read, holds something else, or torch is not installed.
    """
    return _arrays(unpickled(file), file)


def read_pickles(file: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a `*.bin` file that holds several by name, read as by `read_pickle`.

    Raises:
      UserError: It cannot be read, holds something else, or torch is not installed.
    """
    found = unpickled(file)
    if not isinstance(found, Mapping) or not all(isinstance(x, Mapping) for x in found.values()):
        raise UserError(f"{file} does not hold state dicts of modules by name")
    return {name: _arrays(tensors, file) for name, tensors in found.items()}


class Record:
    """The attributes of an object whose class is not loaded, so that none of its code runs."""


def unpickled(file: Path, records: Sequence[str] = ()) -> Any:
    """What a pickle of torch holds, read without running what is in it.

    Args:
      file: The file.
      records: Full names of classes whose objects are read as a `Record`, with arrays of numbers.

    Raises:
      UserError: when it cannot be read so, or torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {file} needs torch, which is not installed") from None
    known: list[Any] = [(Record, name) for name in records]
    known += _numpy_globals() * bool(records)
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _numpy_globals() -> list[Any]:
    """What arrays of numbers are pickled with, under the names of numpy 1 and 2."""
    from numpy._core import multiarray  # pyright: ignore[reportAttributeAccessIssue]

    pairs = ((multiarray._reconstruct, "_reconstruct"), (multiarray.scalar, "scalar"))
    named = [
        (function, f"numpy.{core}.multiarray.{name}")
        for function, name in pairs
        for core in ("core", "_core")
    ]
    dtypes = (np.float32, np.float64, np.int32, np.int64, np.bool_)
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(dtype)) for dtype in dtypes)]


def _arrays(tensors: Any, file: Path) -> dict[str, Tensor]:
    import torch

    own = tensors if isinstance(tensors, Mapping) else {"": tensors}
    for name, x in own.items():
        if not isinstance(x, torch.Tensor):
            raise UserError(
                f"{file} holds no tensors by name: {name or 'it'} is of kind {type(x).__name__}"
            )

    def array(tensor: "torch.Tensor") -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has none of its own
            return tensor.view(torch.int16).numpy().view(stored_dtype("BF16"))
        return tensor.numpy()

    return {name: array(tensor) for name, tensor in own.items()}


def state_dict_name(name: str) -> str:
    """Name in the state dict of transformers 5 of a tensor in a file, whatever release wrote it."""
    for family in VISION_FAMILIES.values():
        for old, new in family.old_modules.items():
            name = name.replace(old, new)
    return renamed(name, file_prefixes())


def file_prefixes() -> dict[str, str]:
    """Beginnings of the names of multimodal LLMs' tensors in files -> in the state dict."""
    families = MLLM_FAMILIES.values()
    return {old: new for family in families for old, new in family.prefixes.items()}


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by name, with those apart that one holds together."""
    halves = {k: v for family in VISION_FAMILIES.values() for k, v in family.halves.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = next((whole for whole in halves if whole in name), None)
        if whole is None:
            found[name] = tensor
            continue
        rows = tensor.shape[0] // len(halves[whole])
        for number, module in enumerate(halves[whole]):
            found[name.replace(whole, module)] = _rows(tensor, number * rows, rows)
    return found


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    if isinstance(tensor, StoredTensor):
        shape = (count, *tensor.shape[1:])
        return dataclasses.replace(tensor, shape=shape, first_row=tensor.first_row + first)
    return tensor[first : first + count]
