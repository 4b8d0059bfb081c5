"""Samples as rows, and planned rows as batches.

Axis legend: B rows of the global batch, b rows of this process, S tokens, N images per row.

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
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample
from moresjax.data.skipping import SkipPolicy
from moresjax.data.sources import Source

PADDING_SAMPLE = -1  # the number of no sample

# The documents of a row, not yet joined: number and row (without pixels) of every sample.
Documents = Sequence[tuple[int, Row]]

# It becomes a row of padding, which has no labels and so no part in the loss.
EMPTY = Row.text(())


@dataclasses.dataclass(frozen=True, eq=False)
class RowReader:
    """Reads the samples of a source as rows, several at a time.

    Attributes:
      source: The samples.
      processor: Turns samples into rows.
      max_seq_len: S, the number of tokens that a row may have.
      images_per_row: N, the number of images that a row may have.
      skip_policy: What happens to bad samples.
      num_workers: How many samples are tokenised, or their images read, at once.
    """

    source: Source
    processor: Processor
    max_seq_len: int
    images_per_row: int
    skip_policy: SkipPolicy
    num_workers: int = 1

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.num_workers, "reading")

    def padded(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The arrays of every sample's padded row; padding alone for a bad one that is skipped.

        The arrays of a ready-made row come from the source; only its image is normalised.
        """
        return list(self._pool.map(self._padded, numbers))

    def _padded(self, number: int) -> dict[str, Any]:
        arrays = self.skip_policy.attempt(number, lambda: self._arrays(self._element(number)))
        if arrays is not None:
            return arrays
        filler = getattr(self.source, "filler", None)
        if filler is None or self.processor.image is None:
            return self.pad(EMPTY)
        size = self.processor.image.size
        return dict(filler) | {"pixels": np.zeros((size, size, 3), np.float32)}

    def _arrays(self, element: Sample | Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(element, Sample):
            return self.pad(self.processor.row(element))
        try:
            return dict(element) | {"pixels": self.processor.normalise(element["pixels"])}
        except UserError as error:
            raise UserError(f"sample {element['id']}: {error}") from None

    def pad(
        self, row: Row, max_seq_len: int | None = None, images_per_row: int | None = None
    ) -> dict[str, Any]:
        """The arrays and the id of a row, padded to the reader's sizes unless others are given."""
        length = self.max_seq_len if max_seq_len is None else max_seq_len
        images = self.images_per_row if images_per_row is None else images_per_row
        return self.processor.pad(row, length, images).to_dict() | {"id": row.id}

    def documents(self, numbers: Iterable[int]) -> list[Documents]:
        """The document of every sample, without pixels; none for padding and bad samples."""
        return list(self._pool.map(self._document, numbers))

    def _document(self, number: int) -> Documents:
        if number == PADDING_SAMPLE:
            return []
        row = self.skip_policy.attempt(number, lambda: self._text_row(number))
        return [] if row is None else [(number, row)]

    def _text_row(self, number: int) -> Row:
        row = self.processor.text_row(self._sample(number))
        self.processor.check_fit(row, self.max_seq_len, self.images_per_row)
        return row

    def _element(self, number: int) -> Sample | Mapping[str, Any]:
        element = self.source[number]
        if isinstance(element, Sample) and (cut := self.processor.left_out(element)):
            self.skip_policy.note_cut(number, element.id, cut)
        return element

    def _sample(self, number: int) -> Sample:
        sample = self._element(number)
        if not isinstance(sample, Sample):
            raise UserError(f"ready-made rows ({sample['id']}) need batching 'pad'")
        return sample

    def with_pixels(self, documents: Documents) -> list[Row | None]:
        """The rows with their pixels; None for those whose images are bad."""
        return list(self._pool.map(self._with_pixels, documents))

    def _with_pixels(self, document: tuple[int, Row]) -> Row | None:
        number, row = document
        if not self.processor.count_images(row):
            return row
        return self.skip_policy.attempt(
            number, lambda: self.processor.with_images(row, self._sample(number))
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Collate:
    """Turns the planned rows of a global batch into the stacked rows of this process.

    Attributes:
      reader: Reads the samples.
      lengths: The lengths that rows may have, rising; a batch gets the shortest that holds its
        longest row.
      own: Which rows of a batch belong to this process.
      always_pixels: Whether batches without an image have pixels too. If not, the vision encoder
        rests.
    """

    reader: RowReader
    lengths: tuple[int, ...]
    own: slice
    always_pixels: bool = False

    def __call__(self, planned: Sequence[Documents]) -> dict[str, np.ndarray]:
        """The arrays `[b, ...]` of this process's rows; `planned` has those of all processes."""
        texts = [row for documents in planned for _, row in documents]
        pixels = self.always_pixels or any(map(self.reader.processor.count_images, texts))
        images = self.reader.images_per_row if pixels else 0
        longest = max(sum(len(row) for _, row in documents) for documents in planned)
        length = next(length for length in self.lengths if length >= longest)
        mine = planned[self.own]
        # All images of the batch are read together, so that no thread waits for a row's last.
        rows = iter(self.reader.with_pixels(list(itertools.chain.from_iterable(mine))))
        members = (itertools.islice(rows, len(documents)) for documents in mine)
        return stack([self._join(documents, length, images) for documents in members])

    def _join(
        self, documents: Iterable[Row | None], length: int, images: int
    ) -> dict[str, np.ndarray]:
        found = [row for row in documents if row is not None]
        return self.reader.pad(self.reader.processor.join(found or [EMPTY]), length, images)
