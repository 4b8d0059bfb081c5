"""MNIST (LeCun et al. 1998): read a handwritten digit.

Files in `mnist/`, from https://yann.lecun.com/exdb/mnist/ and its mirrors:
`t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, packed (`.gz`) or not. MRT's prompt is not
published; this one lists the digits.
"""

import gzip
from pathlib import Path

import numpy as np

from moresjax.core.errors import UserError
from moresjax.evaluation.benchmarks.cifar import label_tasks
from moresjax.evaluation.files import DataRoot, benchmark_folder, check_split, require_file
from moresjax.evaluation.tasks import BenchmarkTask, benchmark


def _read(folder: Path, name: str) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, the rank, the sizes as 4 bytes each, the values."""
    packed = folder / f"{name}.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.is_file() else None
    data = require_file(folder / name).read_bytes() if data is None else data
    rank = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data, ">i4", rank, 4) if len(data) >= 4 + 4 * rank else ()
    values = np.frombuffer(data, np.uint8, offset=min(4 + 4 * rank, len(data)))
    if not rank or data[:3] != b"\0\0\x08" or values.size != np.prod(shape):
        raise UserError(f"{folder / name} is damaged: it is no IDX file of bytes")
    return values.reshape(shape)


@benchmark("mnist")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, by MRT's judge or by the digit that is named."""
    folder = benchmark_folder("mnist", data_root)
    check_split("mnist", split, ("test",))
    images = _read(folder, "t10k-images-idx3-ubyte")
    labels = _read(folder, "t10k-labels-idx1-ubyte")
    grey = np.repeat(images[..., None], 3, axis=-1)
    return label_tasks("mnist", grey, labels, [str(i) for i in range(10)], "digit", limit)
