"""What prompts have in common at their beginning, so that it is read once for all of them.

The questions of a benchmark begin with the same system prompt and often with the same image, those
of a few-shot task with the same examples. Keys and values of these tokens depend on nothing that
comes after them, unless an attached method looks ahead.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moresjax.core.row import Row
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit, WeightDelta
from moresjax.tuning.selectors import REGIONS, parse_selector

LEAST = 8  # tokens in common
SAVED = 256  # tokens of all rows, below which another program is not worth compiling
PER_IMAGE = 1.5  # prompts, from which on images are read before the prompts


@dataclasses.dataclass(frozen=True)
class SharedPrefixes:
    """Beginnings that prompts have in common.

    Attributes:
      of: for every prompt the number of its beginning, -1 for a prompt that is read whole.
      rows: the beginnings, unpadded.
    """

    of: list[int]
    rows: list[Row] = dataclasses.field(default_factory=list)

    def length(self, prompt: int) -> int:
        """Tokens of a prompt's beginning."""
        return 0 if self.of[prompt] < 0 else len(self.rows[self.of[prompt]])

    @property
    def with_images(self) -> bool:
        """Whether the beginnings hold images, all that their prompts have."""
        return any(row.pixels is not None for row in self.rows)

    def adapters(self, names: Sequence[str | None] | None) -> list[str | None] | None:
        """Those of the beginnings, from the prompts'."""
        return None if names is None else [names[self.of.index(n)] for n in range(len(self.rows))]


def find_shared_prefixes(
    rows: Sequence[Row],
    tuning: Tuning,
    adapters: Sequence[str | None] | None = None,
    text: bool = True,
) -> SharedPrefixes:
    """What is to be read before the prompts: all up to the last image of each, where several are
    about the same images; or the text that all begin with.

    Args:
      rows: the prompts; those about the same images hold the same array of pixels.
      tuning: the attached methods.
      adapters: of every prompt.
      text: whether to look for text.
    """
    names = [None] * len(rows) if adapters is None else adapters
    keys: dict[tuple, int] = {}
    of, heads = [-1] * len(rows), []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        visual = np.flatnonzero(row.image >= 0)
        if row.pixels is None or not len(visual) or visual[-1] == len(row) - 1:
            continue
        head = row[: visual[-1] + 1]
        key = name, id(row.pixels), *(x.tobytes() for x in head.fields.values())
        if key not in keys:
            keys[key] = len(heads)
            heads.append(head)
        of[number] = keys[key]
    openings = SharedPrefixes(of, heads)
    about = sum(number >= 0 for number in of)
    if about >= PER_IMAGE * max(len(heads), 1):
        pairs = ((row, openings.length(n)) for n, row in enumerate(rows) if of[n] >= 0)
        if _stand_alone(tuning, pairs):
            return openings
    if text and len(set(names)) == 1 and (head := common_prefix(rows, tuning)) is not None:
        return SharedPrefixes([0] * len(rows), [head])
    return SharedPrefixes([-1] * len(rows))


def common_prefix(rows: Sequence[Row], tuning: Tuning) -> Row | None:
    """The row of the tokens that all prompts begin with, up to the first image.

    Every prompt keeps a token of its own. None where the tokens are few, or where a method would
    treat them otherwise if they were the whole prompt.
    """
    size = min(map(len, rows), default=1) - 1
    for row in rows:
        visual = np.flatnonzero(row.image >= 0)
        size = min(size, rows[0].common_prefix(row), *visual[:1].tolist())
    if size < LEAST or size * (len(rows) - 1) < SAVED:
        return None
    if not _stand_alone(tuning, ((row, size) for row in rows)):
        return None
    return rows[0][:size].replace(pixels=None)


def _stand_alone(tuning: Tuning, rows: Iterable[tuple[Row, int]]) -> bool:
    """Whether what the methods do to so many first tokens of each row does not depend on the rest
    of it."""
    seen, later = set(), set()
    for row, size in rows:
        seen |= set(row.kind[:size].tolist())
        later |= set(row.kind[size:].tolist())
    for _, method in tuning.methods:
        if isinstance(method, WeightDelta) and method.sees_tokens:
            return False
        if not isinstance(method, Edit):
            continue
        for region, part in parse_selector(method.positions).parts:
            kinds = set(REGIONS.get(region, ()))
            # A slice of a region that ends before the rest begins is the same slice.
            if part.kind != "all" and kinds & seen and kinds & later:
                return False
            if region == "last_prompt":
                return False
    return True
