"""The binary files of CIFAR-10 and CIFAR-100 (Krizhevsky 2009)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from moresjax.core.errors import UserError

SIDE = 32
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def read_cifar(
    folder: Path, files: Sequence[str], names: str, label: int = 0
) -> tuple[UInt8[np.ndarray, "N 32 32 3"], UInt8[np.ndarray, " N"], list[str]]:
    """Images, labels and the names of the classes.

    Args:
      folder: The folder of the official download.
      files: Its binary files.
      names: The file with a class on each line.
      label: The place of the label among the bytes of a record.

    Raises:
      UserError: A file is missing or damaged.
    """
    for name in (*files, names):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist; it belongs to the official download "
                "(https://www.cs.toronto.edu/~kriz/cifar.html, the binary version)"
            )
    rows = np.concatenate([_rows(folder / name, label) for name in files])
    images = rows[:, label + 1 :].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    classes = [line.replace("_", " ") for line in (folder / names).read_text().split()]
    if rows[:, label].max() >= len(classes):
        raise UserError(f"{folder / names} names {len(classes)} classes; a label is beyond them")
    return images, rows[:, label], classes


def _rows(path: Path, label: int) -> UInt8[np.ndarray, "N bytes"]:
    data, length = np.fromfile(path, np.uint8), label + 1 + 3 * SIDE * SIDE
    if not len(data) or len(data) % length:
        raise UserError(f"{path} is damaged: it has {len(data)} bytes, not n x {length}")
    return data.reshape(-1, length)
