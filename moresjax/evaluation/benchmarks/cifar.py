"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): name the object.

Files, the binary versions of https://www.cs.toronto.edu/~kriz/cifar.html: in `cifar10/`
`test_batch.bin` and `batches.meta.txt`, in `cifar100/` `test.bin` and `fine_label_names.txt`.
MRT's prompt is not published; this one lists the classes.
"""

import numpy as np

from moresjax.data.cifar import read_cifar
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    llava_prompt,
    result_reader,
)
from moresjax.evaluation.scoring import label_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 10_000


def label_tasks(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    thing: str,
    limit: int | None,
) -> list[BenchmarkTask]:
    """The task of naming the class of uint8 images `[N, Y, X, 3]`."""
    prompt = llava_prompt(f"What is the {thing} in the image? Choose from: {', '.join(classes)}.")
    numbers = limit_rows(range(len(images)), limit, name, SIZE)
    examples = [Example(str(i), prompt, classes[labels[i]], (images[i],)) for i in numbers]
    read = result_reader(None, "prediction")
    return [
        BenchmarkTask(name, examples, max_new_tokens=16, scorer=label_scorer(classes), read=read)
    ]


def _tasks(
    name: str,
    file: str,
    names: str,
    label: int,
    data_root: DataRoot,
    limit: int | None,
    split: str,
) -> list[BenchmarkTask]:
    """The task of one data set; `label` is the place of the label among the bytes of a record."""
    folder = benchmark_folder(name, data_root)
    check_split(name, split, ("test",))
    images, labels, classes = read_cifar(folder, (file,), names, label)
    return label_tasks(name, images, labels, classes, "object", limit)


@benchmark("cifar10")
def load10(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, by MRT's judge or by the label that is named."""
    return _tasks("cifar10", "test_batch.bin", "batches.meta.txt", 0, data_root, limit, split)


@benchmark("cifar100")
def load100(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """The same with a hundred classes."""
    # A byte for the superclass comes first.
    return _tasks("cifar100", "test.bin", "fine_label_names.txt", 1, data_root, limit, split)
