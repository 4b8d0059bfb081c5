"""Samples as rows, and planned rows as batches.

Axis legend: B rows of the global batch, b rows of this process, N images per row.

Which samples share a batch or a row is planned from their texts, which every process tokenises
alike; images are read for a process's own rows only. So a plan is the same for any number of
processes, and a sample whose image turns out to be bad leaves padding behind and moves no other.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.row import Row, stack
from moresjax.data.bad import BadSamples
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample
from moresjax.data.sources import Source

PADDING_SAMPLE = -1  # the number of no sample

# The documents of a row, not yet joined: number and row without pixels of every sample.
Documents = Sequence[tuple[int, Row]]

# A row of padding: it has no labels, so the loss does not know it.
EMPTY = Row.text(())


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Random access to the samples of a source as rows.

    Attributes:
      source: the samples.
      processor: how they become rows.
      length: S, tokens that a row may have.
      images: N, images that it may have.
      bad: what becomes of bad samples.
      threads: how many are tokenised, or read, at once.
    """

    source: Source
    processor: Processor
    length: int
    images: int
    bad: BadSamples
    threads: int = 1

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "reading")

    def padded(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The padded row of every sample; padding alone for a bad one that is skipped.

        Ready-made rows only have their images normalised.
        """
        return list(self._pool.map(self._padded, numbers))

    def _padded(self, number: int) -> dict[str, Any]:
        row = self.bad.guard(number, lambda: self._row(self.source[number]))
        return self._pad(EMPTY) if row is None else row

    def _row(self, element: Sample | Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(element, Sample):
            return dict(element) | {"pixels": self.processor.image(element["pixels"])}
        return self._pad(self.processor.row(element))

    def _pad(self, row: Row) -> dict[str, Any]:
        return self.processor.pad(row, self.length, self.images).to_dict() | {"id": row.id}

    def texts(self, numbers: Iterable[int]) -> list[Documents]:
        """The document of every sample, without pixels; none for padding and bad samples."""
        return list(self._pool.map(self._documents, numbers))

    def _documents(self, number: int) -> Documents:
        row = (
            None if number == PADDING_SAMPLE else self.bad.guard(number, lambda: self._text(number))
        )
        return [] if row is None else [(number, row)]

    def _text(self, number: int) -> Row:
        sample = self.source[number]
        if not isinstance(sample, Sample):
            raise UserError(f"ready-made rows ({sample['id']}) need batching 'pad'")
        row = self.processor.text_row(sample)
        self.processor.check_fit(row, self.length, self.images)
        return row

    def whole(self, documents: Documents) -> list[Row | None]:
        """The rows with their pixels; None for those whose images are bad."""
        return list(self._pool.map(self._whole, documents))

    def _whole(self, document: tuple[int, Row]) -> Row | None:
        number, row = document
        if not self.processor.count_images(row):
            return row
        pixels = lambda: self.processor.pixels(self.source[number])  # noqa: E731
        return self.bad.guard(number, lambda: row.replace(pixels=pixels()))


@dataclasses.dataclass(frozen=True, eq=False)
class Collate:
    """The planned rows of a global batch to the stacked rows of this process.

    Attributes:
      rows: where the samples come from.
      lengths: that rows may have, rising; a batch has the shortest that holds its longest row.
      own: which rows of a batch belong to this process.
      pixels: whether batches without an image have pixels too. If not, the vision encoder rests.
    """

    rows: Rows
    lengths: tuple[int, ...]
    own: slice
    pixels: bool = False

    def __call__(self, planned: Sequence[Documents]) -> dict[str, np.ndarray]:
        texts = [row for documents in planned for _, row in documents]
        seen = self.pixels or any(map(self.rows.processor.count_images, texts))
        images = self.rows.images if seen else 0
        longest = max(sum(len(row) for _, row in documents) for documents in planned)
        length = next(length for length in self.lengths if length >= longest)
        mine = planned[self.own]
        # All images of the batch are read together, so that no thread waits for a row's last.
        wholes = iter(self.rows.whole(list(itertools.chain.from_iterable(mine))))
        parts = (itertools.islice(wholes, len(documents)) for documents in mine)
        return stack([self._row(part, length, images) for part in parts])

    def _row(self, documents: Iterable[Row | None], length: int, images: int) -> dict[str, Any]:
        found = [row for row in documents if row is not None]
        joined = self.rows.processor.join(found or [EMPTY])
        return self.rows.processor.pad(joined, length, images).to_dict() | {"id": joined.id}
