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
    tokens: Sequence[int], images: Sequence[int], max_seq_len: int, images_per_row: int
) -> list[list[int]]:
    """Puts samples, in their order, each into the first row that still has room for it.

    >>> first_fit([5, 4, 3], [0, 0, 0], max_seq_len=8, images_per_row=0)
    [[0, 2], [1]]

    Args:
      tokens: The number of tokens of every sample, each at most `max_seq_len`.
      images: The number of images of every sample, each at most `images_per_row`.
      max_seq_len: The number of tokens that a row holds.
      images_per_row: The number of images that a row holds.

    Returns:
      The samples of every row, by number.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for sample, (needed, pictures) in enumerate(zip(tokens, images, strict=True)):
        fits = (i for i, (t, p) in enumerate(room) if needed <= t and pictures <= p)
        place = next(fits, len(rows))
        if place == len(rows):
            rows.append([])
            room.append((max_seq_len, images_per_row))
        rows[place].append(sample)
        room[place] = room[place][0] - needed, room[place][1] - pictures
    return rows


@dataclasses.dataclass(frozen=True)
class PackWindow(grain.experimental.FlatMapTransform):
    """Turns a window of samples into the rows that they share.

    Attributes:
      count_images: Says how many images a sample has.
      max_seq_len: S, the number of tokens per row.
      images_per_row: N, the number of images per row; 0 for text.
    """

    count_images: Callable[[Row], int]
    max_seq_len: int
    images_per_row: int

    def flat_map(self, element: Sequence[Documents]) -> list[Documents]:
        """The documents of every row, from those of a window."""
        documents = list(itertools.chain.from_iterable(element))
        tokens = [len(row) for _, row in documents]
        images = [self.count_images(row) for _, row in documents]
        packed = first_fit(tokens, images, self.max_seq_len, self.images_per_row)
        return [[documents[i] for i in members] for members in packed]
