"""Packing: several samples share a row of fixed length, as documents that do not see each other.

Rows are filled within windows of consecutive samples and come out when their window is full. So the
position of the data is that of a window and a row in it, whatever the samples' lengths.
"""

import dataclasses
from collections.abc import Sequence

import grain

from moresjax.data.processor import Processor, Row


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
    """A window of unpadded rows to full ones.

    Attributes:
      processor: joins and pads them.
      length: S, tokens per row.
      images: N, images per row; 0 for text.
    """

    processor: Processor
    length: int
    images: int

    def flat_map(self, element: Sequence[Row]) -> list[Row]:
        tokens = [len(row["tokens"]) for row in element]
        images = [len(row.get("pixels", ())) if self.images else 0 for row in element]
        packed = []
        for members in first_fit(tokens, images, self.length, self.images):
            rows = [element[i] for i in members]
            row = self.processor.pad(self.processor.join(rows), self.length, self.images)
            packed.append(row | {"id": ";".join(row["id"] for row in rows)})
        return packed
