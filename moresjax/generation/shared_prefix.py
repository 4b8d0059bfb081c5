"""What prompts have in common at their beginning, so that it is read once for all of them.

The questions of a benchmark begin with the same system prompt and often with the same image, those
of a few-shot task with the same examples. Keys and values of these tokens depend on nothing that
comes after them, unless an attached method looks ahead.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moresjax.core.row import Row
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit, WeightDelta
from moresjax.tuning.selectors import REGIONS, parse_selector


@dataclasses.dataclass(frozen=True)
class SharedPrefixes:
    """Prefixes that prompts have in common.

    Attributes:
      prefix_index: For every prompt the number of its prefix; -1 for a prompt that is read whole.
      rows: The prefixes, unpadded.
    """

    prefix_index: list[int]
    rows: list[Row] = dataclasses.field(default_factory=list)

    def length(self, prompt: int) -> int:
        """The number of tokens of a prompt's prefix."""
        number = self.prefix_index[prompt]
        return 0 if number < 0 else len(self.rows[number])

    @property
    def with_images(self) -> bool:
        """Whether the prefixes hold images, which are all that their prompts have."""
        return any(row.pixels is not None for row in self.rows)

    def adapters(self, names: Sequence[str | None] | None) -> list[str | None] | None:
        """The adapter of every prefix.

        Args:
          names: The adapter of every prompt.
        """
        if names is None:
            return None
        return [names[self.prefix_index.index(n)] for n in range(len(self.rows))]


def find_shared_prefixes(
    rows: Sequence[Row],
    tuning: Tuning,
    adapters: Sequence[str | None] | None = None,
    text: bool = True,
    config: EngineConfig = DEFAULT_ENGINE_CONFIG,
) -> SharedPrefixes:
    """What is to be read before the prompts.

    Where several prompts are about the same images, it is all up to the last image of each;
    otherwise the text that all begin with.

    Args:
      rows: The prompts; those about the same images hold the same array of pixels.
      tuning: The attached methods.
      adapters: The adapter of every prompt; default: the base model.
      text: Whether to look for text.
      config: The knobs that tell when reading a prefix by itself pays.
    """
    names = [None] * len(rows) if adapters is None else adapters
    numbers: dict[tuple, int] = {}
    prefix_index, prefixes = [-1] * len(rows), []
    for prompt, (row, name) in enumerate(zip(rows, names, strict=True)):
        visual = np.flatnonzero(row.image >= 0)
        if row.pixels is None or not len(visual) or visual[-1] == len(row) - 1:
            continue
        prefix = row[: visual[-1] + 1]
        key = name, id(row.pixels), *(x.tobytes() for x in prefix.fields.values())
        if key not in numbers:
            numbers[key] = len(prefixes)
            prefixes.append(prefix)
        prefix_index[prompt] = numbers[key]
    shared = SharedPrefixes(prefix_index, prefixes)
    about = sum(number >= 0 for number in prefix_index)
    if about >= config.min_prompts_per_image * max(len(prefixes), 1):
        pairs = ((row, shared.length(n)) for n, row in enumerate(rows) if prefix_index[n] >= 0)
        if _stand_alone(tuning, pairs):
            return shared
    if text and len(set(names)) == 1:
        prefix = common_prefix(rows, tuning, config)
        if prefix is not None:
            return SharedPrefixes([0] * len(rows), [prefix])
    return SharedPrefixes([-1] * len(rows))


def common_prefix(
    rows: Sequence[Row], tuning: Tuning, config: EngineConfig = DEFAULT_ENGINE_CONFIG
) -> Row | None:
    """The row of the tokens that all prompts begin with, up to the first image.

    Every prompt keeps a token of its own. None where the tokens are few, or where a method would
    treat them otherwise if they were the whole prompt.

    Args:
      rows: The prompts.
      tuning: The attached methods.
      config: The knobs that tell when reading a prefix by itself pays.
    """
    size = min(map(len, rows), default=1) - 1
    for row in rows:
        visual = np.flatnonzero(row.image >= 0)
        size = min(size, rows[0].common_prefix(row), *visual[:1].tolist())
    saved = size * (len(rows) - 1)
    if size < config.min_prefix_tokens or saved < config.min_saved_tokens:
        return None
    if not _stand_alone(tuning, ((row, size) for row in rows)):
        return None
    return rows[0][:size].replace(pixels=None)


def _stand_alone(tuning: Tuning, rows: Iterable[tuple[Row, int]]) -> bool:
    """Whether the methods treat the first tokens of each row independently of the rest of it.

    Args:
      tuning: The attached methods.
      rows: Each row with the number of its first tokens.
    """
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
