"""Prompts that wait to be read, in groups of one size, and the beginnings that they share.

Neighbours have about the same length and the same beginning. Groups and beginnings are filled up to
one size and a bucket length: few shapes, few compilations.
"""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence

from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.data.images import LazyPixels
from moresjax.generation.engine import Prefix, bucket, join, rounded
from moresjax.generation.shared_prefix import SharedPrefixes


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts that are read together.

    Attributes:
      numbers: which ones.
      filled: the rows of the batch; those after `numbers` are fillers.
      batch: the prompts, without images that their beginnings hold.
      prefix: beginnings that are read already, or None.
      beginnings: which of them each row has.
    """

    numbers: list[int]
    filled: list[int]
    batch: Batch
    prefix: Prefix | None
    beginnings: list[int]


class PrefillScheduler:
    """Prompts that wait to be read.

    Args:
      rows: the prompts, unpadded.
      make_batch: makes a batch of rows, padded to a length, with the names of their adapters.
      size: rows of a group.
      adapters: of every prompt.
      openings: what prompts have in common; default: nothing.
      read: reads beginnings of some numbers, which are equally long.
      parts: the number of beginnings that are read at a time is a multiple of it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        make_batch: Callable[[Sequence[Row], int, Sequence[str | None] | None], Batch],
        size: int,
        *,
        adapters: Sequence[str | None] | None = None,
        openings: SharedPrefixes | None = None,
        read: Callable[[Sequence[int]], Prefix] | None = None,
        parts: int = 1,
    ):
        self._rows, self._make_batch, self.size = rows, make_batch, size
        self._adapters, self._read = adapters, read
        self._openings = openings = openings or SharedPrefixes([-1] * len(rows))
        longest: dict[int, int] = {}
        for number, row in zip(openings.of, rows, strict=True):
            longest[number] = max(longest.get(number, 0), len(row))

        def order(prompt):
            number = openings.of[prompt]
            together = (-longest[number], number) if number >= 0 else ()
            return -openings.length(prompt), *together, -len(rows[prompt])

        self._waiting = deque(sorted(range(len(rows)), key=order))
        # Beginnings are read in equal numbers too: as many as a group has on average. Those of the
        # last two times are held, because a group may begin with some and end with others.
        having = max(sum(number >= 0 for number in openings.of), 1)
        self._at_once = -(-size * len(openings.rows) // having)
        self._at_once += -self._at_once % parts
        self._of_length = Counter(len(row) for row in openings.rows)
        self._last, self._held = _NOTHING, _NOTHING

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def longest(self) -> int:
        """The largest padded length of a prompt."""
        return max(map(self._padded, range(len(self._rows))), default=0)

    def _padded(self, prompt: int) -> int:
        shared = self._openings.length(prompt)
        return bucket(len(self._rows[prompt]) - shared) + rounded(shared)

    def take(self) -> Group:
        """The next prompts."""
        of, length = self._openings.of, self._openings.length
        first, prompts = self._waiting[0], []
        while self._waiting and len(prompts) < self.size:
            prompt = self._waiting[0]
            if length(prompt) != length(first):
                break
            if of[prompt] >= 0 and of[prompt] not in self._held.numbers:
                if any(of[i] not in self._last.numbers for i in prompts):
                    break
                self._read_ahead()
            prompts.append(self._waiting.popleft())
        filled = prompts + prompts[:1] * (self.size - len(prompts))
        names = None if self._adapters is None else [self._adapters[i] for i in filled]
        rows = [self._rows[i] for i in filled]
        if of[first] >= 0 and self._openings.with_images:
            rows = [row.replace(pixels=None) for row in rows]
        batch = self._make_batch(rows, max(map(self._padded, prompts)), names)
        self._open_ahead()
        if of[first] < 0:
            return Group(prompts, filled, batch, None, [0] * self.size)
        beginnings = [self._held.numbers.index(of[i]) for i in filled]
        return Group(prompts, filled, batch, self._held.prefix, beginnings)

    def _open_ahead(self) -> None:
        """Starts to open the images of the prompts that come next, while others are answered."""
        for prompt in itertools.islice(self._waiting, self.size):
            pixels, number = self._rows[prompt].pixels, self._openings.of[prompt]
            read = self._openings.with_images and number in self._held.numbers
            if isinstance(pixels, LazyPixels) and not read:
                pixels.fetch()

    def _read_ahead(self) -> None:
        """Reads the beginnings that come next, and forgets those before the last ones."""
        of, length = self._openings.of, self._openings.length
        size = length(self._waiting[0])
        near = itertools.takewhile(lambda prompt: length(prompt) == size, self._waiting)
        different = (number for number, _ in itertools.groupby(of[prompt] for prompt in near))
        numbers = list(itertools.islice(different, self._at_once))
        numbers += numbers[:1] * (self._at_once - len(numbers))
        read = _Read(numbers, self._read(numbers))
        before, self._last = self._last, read
        if self._of_length[size] <= self._at_once:
            self._held = read
            return
        # The same number from the beginning on: one program.
        if before.prefix is None or before.prefix.length != size:
            before = read
        self._held = _Read(before.numbers + numbers, join(before.prefix, read.prefix))


@dataclasses.dataclass(frozen=True)
class _Read:
    """Beginnings that are read, and their numbers."""

    numbers: list[int]
    prefix: Prefix | None


_NOTHING = _Read([], None)
