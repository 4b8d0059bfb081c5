"""Tensors in the files of a folder: safetensors, and pickles when they are allowed."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors import safe_open

from moresjax.core.errors import UserError
from moresjax.weights.families.base import MLLM_FAMILIES, VISION_FAMILIES, renamed
from moresjax.weights.families.tinyllava import STAGE_FOLDERS
from moresjax.weights.tensor_mapping import Tensor, stored_dtype


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
      folder: A folder with `*.safetensors`, or with TinyLLaVA Factory's folders that have them.
      allow_pickle: Whether torch may read `*.bin` (weights only) when there is nothing else.

    Raises:
      UserError: when there is no file that may be read, or one cannot be.
    """
    stages = {prefix: folder / name for name, prefix in STAGE_FOLDERS.items()}
    whole = not all(stage.is_dir() for stage in stages.values())
    found: dict[str, Tensor] = {}
    for prefix, place in ({"": folder} if whole else stages).items():
        for name, tensor in _stored(place, allow_pickle).items():
            name = state_dict_name(prefix + name)
            found |= _halves(name, tensor) or {name: tensor}
    return found


def _stored(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if files := sorted(folder.glob("*.safetensors")):
        return {name: tensor for file in files for name, tensor in _safetensors(file).items()}
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise UserError(f"{folder} has no *.safetensors file")
    if not allow_pickle:
        raise UserError(
            f"{folder} has only pickled weights ({pickles[0].name}), and pickles run code; "
            "allow it with --allow-pickle if you trust its source"
        )
    return {name: tensor for file in pickles for name, tensor in read_pickle(file).items()}


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
      UserError: when it cannot be read, or torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {file} needs torch, which is not installed") from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None

    def array(tensor: "torch.Tensor") -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has none of its own
            return tensor.view(torch.int16).numpy().view(stored_dtype("BF16"))
        return tensor.numpy()

    return {name: array(tensor) for name, tensor in tensors.items()}


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


def _halves(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The two tensors that one is made of, by name; nothing for most."""
    halves = {k: v for family in VISION_FAMILIES.values() for k, v in family.halves.items()}
    for whole, modules in halves.items():
        if whole in name:
            rows = tensor.shape[0] // len(modules)
            return {
                name.replace(whole, module): _rows(tensor, number * rows, rows)
                for number, module in enumerate(modules)
            }
    return {}


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    if isinstance(tensor, StoredTensor):
        shape = (count, *tensor.shape[1:])
        return dataclasses.replace(tensor, shape=shape, first_row=tensor.first_row + first)
    return tensor[first : first + count]
