"""Images with labels, of the whole or of patches, in JSON files: what trains a vision encoder.

A record is `{"image": "a.png", "label": "cat"}`, whose label every patch is given, or `{"image":
"a.png", "labels": [["sky", "sky"], ["cat", null]]}`: the rows of a grid with a label for each
patch, `null` for none. All records of a source are of one kind. Labels are texts or whole numbers.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError
from moresjax.data.images import image_path
from moresjax.data.records import JsonRecords

UNLABELLED = -1  # the class of a patch without a label


@dataclasses.dataclass(frozen=True)
class LabelsSource:
    """Images and the classes of their patches, for objective `patch_classes`.

    >>> import json, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> records = [{"image": "a.png", "label": "dog"}, {"image": "b.png", "label": "cat"}]
    >>> _ = (folder / "labels.json").write_text(json.dumps(records))
    >>> source = LabelsSource(str(folder / "labels.json"), str(folder))
    >>> source.class_names, source[0]["classes"].tolist()
    (('cat', 'dog'), [[1]])

    Attributes:
      files: The paths of JSON or JSON Lines files, joined by `;`.
      image_root: The folder that image paths start from.
      classes: The labels in the order of their numbers, joined by `;`; empty: those of the files,
        sorted.
    """

    files: str
    image_root: str = "."
    classes: str = ""
    branches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not Path(self.image_root).is_dir():
            raise UserError(f"image_root {self.image_root} is not a folder")
        _ = self._scanned
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"data classes {self.classes!r} name a label twice")
        if len(self.class_names) < 2:
            found = ", ".join(self.class_names) or "none"
            raise UserError(f"labels of {self.files}: two classes at least are needed, got {found}")

    @functools.cached_property
    def _scanned(self) -> tuple[tuple[JsonRecords, ...], Counter[str]]:
        """The files, indexed, and how many labels of each kind they hold."""
        counts: Counter[str] = Counter()

        def count(record: Any) -> tuple[int, int]:
            try:
                rows = _grid(record, "")
                counts.update(str(label) for row in rows for label in row if label is not None)
            except UserError:
                return 0, 0  # whoever asks for the record is told what is wrong with it
            return len(rows), len(rows[0])

        return tuple(JsonRecords.scan(path, count) for path in self.files.split(";")), counts

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The labels in the order of their numbers."""
        if self.classes:
            return tuple(self.classes.split(";"))
        found = self._scanned[1]
        numbers = all(name.lstrip("-").isdecimal() for name in found)
        return tuple(sorted(found, key=int if numbers else str))

    @property
    def label_counts(self) -> dict[str, int]:
        """How many labels the files hold of every class, in their order."""
        return {name: self._scanned[1][name] for name in self.class_names}

    @functools.cached_property
    def _shape(self) -> tuple[int, int]:
        """The rows and columns of the first good record's grid."""
        sizes = np.concatenate([records.sizes for records in self._scanned[0]])
        good = sizes[sizes[:, 0] > 0]
        return (int(good[0, 0]), int(good[0, 1])) if len(good) else (1, 1)

    @property
    def filler(self) -> dict[str, Any]:
        """What stands for an image that is skipped: it has no label, and so no part in the loss."""
        rows, columns = self._shape
        return {"id": "", "classes": np.full((rows * columns, 1), UNLABELLED, np.int32)}

    def __len__(self) -> int:
        return sum(map(len, self._scanned[0]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`id`, `pixels` (a path), and `classes` `[P, 1]`, or `[1, 1]` for a whole image."""
        files = self._scanned[0]
        borders = np.cumsum([0, *map(len, files)])
        file = int(np.searchsorted(borders, index, side="right")) - 1
        number = index - int(borders[file])
        record, name = files[file][number], f"{files[file].path.name}[{number}]"
        rows = _grid(record, name)
        if (shape := (len(rows), len(rows[0]))) != self._shape:
            raise UserError(
                f"sample {name}: its labels are {shape[0]} x {shape[1]}, those of others "
                f"{self._shape[0]} x {self._shape[1]}; files of one source are of one kind"
            )
        path = image_path(self.image_root, record["image"], f"sample {name}")
        classes = [self._number(label, name) for row in rows for label in row]
        return {"id": name, "pixels": path, "classes": _column(classes)}

    def _number(self, label: Any, name: str) -> int:
        if label is None:
            return UNLABELLED
        if str(label) not in self.class_names:
            known = ", ".join(self.class_names)
            raise UserError(f"sample {name}: label {label!r} is none of the classes {known}")
        return self.class_names.index(str(label))


def _column(classes: Sequence[int]) -> Int[np.ndarray, "P 1"]:
    return np.asarray(classes, np.int32)[:, None]


def _grid(record: Any, name: str) -> list[list[Any]]:
    """The labels of a record in rows; one row of one label for a whole image."""
    if not isinstance(record, Mapping) or not isinstance(record.get("image"), str):
        raise UserError(f"sample {name}: a record has an `image`, which is a path, and its labels")
    if ("label" in record) == ("labels" in record):
        raise UserError(f"sample {name}: it must have either `label` or `labels`")
    rows = [[record["label"]]] if "label" in record else record["labels"]
    lists = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
    if not lists or len({len(row) for row in rows}) > 1:
        raise UserError(f"sample {name}: `labels` must be rows of equally many labels")
    for label in (label for row in rows for label in row):
        if isinstance(label, bool) or not isinstance(label, str | int | None):
            raise UserError(
                f"sample {name}: a label must be a text or a whole number, got {label!r}"
            )
    return rows
