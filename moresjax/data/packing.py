"""Packing: several samples share a row of fixed length, as documents that do not see each other.

Rows are filled within windows of consecutive samples and come out when their window is full. So the
position of the data is that of a window and a row in it, whatever the samples' lengths and however
many processes share the rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import grain

from moresjax.core.row import Row
from moresjax.data.rows import Documents


def first_fit(
    lengths: Sequence[int], images: Sequence[int], length: int, capacity: int
) -> list[list[int]]:
    """Puts samples, in their order, each into the first row that still has room for it.

    Args:
      lengths: tokens of every sample, each at most `length`.
      images: images of every sample, each at most `capacity`.
      length: tokens that a row holds.
      capacity: images that a row holds.

    Returns:
      The samples of every row, by number.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for sample, (tokens, pictures) in enumerate(zip(lengths, images, strict=True)):
        fits = (i for i, (t, p) in enumerate(room) if tokens <= t and pictures <= p)
        place = next(fits, len(rows))
        if place == len(rows):
            rows.append([])
            room.append((length, capacity))
        rows[place].append(sample)
        room[place] = room[place][0] - tokens, room[place][1] - pictures
    return rows


@dataclasses.dataclass(frozen=True)
class PackWindow(grain.experimental.FlatMapTransform):
    """A window of samples to the rows that they share.

    Attributes:
      images_of: how many images a sample has.
      length: S, tokens per row.
      images: N, images per row; 0 for text.
    """

    images_of: Callable[[Row], int]
    length: int
    images: int

    def flat_map(self, element: Sequence[Documents]) -> list[Documents]:
        documents = list(itertools.chain.from_iterable(element))
        tokens = [len(row) for _, row in documents]
        images = [self.images_of(row) for _, row in documents]
        packed = first_fit(tokens, images, self.length, self.images)
        return [[documents[i] for i in members] for members in packed]
