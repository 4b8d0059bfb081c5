"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): name the object.

Files, the binary versions of https://www.cs.toronto.edu/~kriz/cifar.html: in `cifar10/`
`test_batch.bin` and `batches.meta.txt`, in `cifar100/` `test.bin` and `fine_label_names.txt`.
MRT's prompt is not published; this one lists the classes.
"""

import numpy as np

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, need_file, read_rows
from moresjax.evaluation.scoring import one_label
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 10_000
SIDE = 32


def label_items(
    name: str, images: np.ndarray, labels: np.ndarray, classes: list[str], thing: str, limit
) -> list[VisualTask]:
    """The task of naming the class of uint8 images `[N, Y, X, 3]`."""
    prompt = ask(f"What is the {thing} in the image? Choose from: {', '.join(classes)}.")
    numbers = first(range(len(images)), limit, name, SIZE)
    items = [Item(str(i), prompt, classes[labels[i]], (images[i],)) for i in numbers]
    read = read_rows(None, "prediction")
    return [VisualTask(name, items, max_new_tokens=16, score=one_label(classes), read=read)]


def _tasks(name: str, file: str, names: str, label: int, data_root, limit, split):
    """`label` is how many label bytes come before the one that counts."""
    folder = folder_of(name, data_root)
    choose_split(name, split, ("test",))
    data = np.fromfile(need_file(folder / file), np.uint8)
    length = label + 1 + 3 * SIDE * SIDE
    if not len(data) or len(data) % length:
        raise UserError(f"{folder / file} is damaged: it has {len(data)} bytes, not n x {length}")
    rows = data.reshape(-1, length)
    images = rows[:, label + 1 :].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    classes = [line.replace("_", " ") for line in need_file(folder / names).read_text().split()]
    return label_items(name, images, rows[:, label], classes, "object", limit)


@benchmark("cifar10")
def load10(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy, by MRT's judge or by the label that is named."""
    return _tasks("cifar10", "test_batch.bin", "batches.meta.txt", 0, data_root, limit, split)


@benchmark("cifar100")
def load100(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """The same with a hundred classes."""
    # A byte for the superclass comes first.
    return _tasks("cifar100", "test.bin", "fine_label_names.txt", 1, data_root, limit, split)
