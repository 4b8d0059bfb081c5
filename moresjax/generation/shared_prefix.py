"""What prompts have in common at their beginning, so that it is read once for all of them.

The questions of a benchmark begin with the same system prompt and often with the same image, those
of a few-shot task with the same examples. Keys and values of these tokens depend on nothing that
comes after them, unless an attached method looks ahead.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moresjax.core.layout import TokenKind
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

    def tokens_read(self, prompts: Sequence[Row]) -> int:
        """How many tokens are read, those of prefixes included."""
        rest = (len(row) - self.length(number) for number, row in enumerate(prompts))
        return sum(map(len, self.rows)) + sum(rest)

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

    Where several prompts are about the same images, it is all up to the last image of each; where
    the same prompts come several times, for several adapters, it is all but their last token,
    whichever leaves fewer tokens to read; otherwise the text that all begin with.

    Args:
      rows: The prompts; those about the same images hold the same array of pixels. Prompts with
        other regions of interest, or other marks up to the images, share nothing of them.
      tuning: The attached methods.
      adapters: The adapter of every prompt; default: the base model.
      text: Whether to look for text.
      config: The knobs that tell when reading a prefix by itself pays.
    """
    # An image that ends a prompt is not cut: its tokens may see each other.
    whole = {
        n: (row, len(row) - 1)
        for n, row in enumerate(rows)
        if (text or row.pixels is not None) and row.image[-1] < 0
    }
    found = [
        _grouped(rows, pairs, tuning, adapters, config) for pairs in (_up_to_images(rows), whole)
    ]
    if any(shared.rows for shared in found):
        return min((own for own in found if own.rows), key=lambda own: own.tokens_read(rows))
    return shared_text(rows, tuning, adapters, config) if text else found[0]


def _grouped(
    rows: Sequence[Row],
    pairs: Mapping[int, tuple[Row, int]],
    tuning: Tuning,
    adapters: Sequence[str | None] | None,
    config: EngineConfig,
) -> SharedPrefixes:
    """Equal beginnings of some prompts, where they are few enough for so many prompts.

    Args:
      rows: All prompts.
      pairs: By number, prompts with the number of their first tokens.
      tuning: The attached methods.
      adapters: The adapter of every prompt; default: the base model.
      config: The knobs that tell when reading a prefix by itself pays.
    """
    names = [None] * len(rows) if adapters is None else adapters
    # What no method acts on is the same for every adapter.
    alike = len(set(names)) > 1 and not _acts(tuning, pairs.values())
    own = [None] * len(rows) if alike else names
    numbers: dict[tuple, int] = {}
    prefix_index, prefixes, saved = [-1] * len(rows), [], 0
    for prompt, (row, size) in pairs.items():
        prefix = row[:size]
        fields = (x.tobytes() for x in prefix.fields.values())
        key = own[prompt], id(row.pixels), row.region_key, *fields
        if key not in numbers:
            numbers[key] = len(prefixes)
            prefixes.append(prefix)
        else:
            saved += size
        prefix_index[prompt] = numbers[key]
    pays = any(row.pixels is not None for row in prefixes) or saved >= config.min_saved_tokens
    enough = len(pairs) >= config.min_prompts_per_image * max(len(prefixes), 1)
    if prefixes and pays and enough and _stand_alone(tuning, pairs.values()):
        return SharedPrefixes(prefix_index, prefixes)
    return SharedPrefixes([-1] * len(rows))


def shared_text(
    rows: Sequence[Row],
    tuning: Tuning,
    adapters: Sequence[str | None] | None = None,
    config: EngineConfig = DEFAULT_ENGINE_CONFIG,
) -> SharedPrefixes:
    """The text that all prompts begin with, if reading it once pays.

    Args:
      rows: The prompts.
      tuning: The attached methods.
      adapters: The adapter of every prompt; default: the base model.
      config: The knobs that tell when reading a prefix by itself pays.
    """
    one = adapters is None or len(set(adapters)) == 1
    prefix = common_prefix(rows, tuning, config)
    if prefix is not None and (one or not _acts(tuning, [(rows[0], len(prefix))])):
        return SharedPrefixes([0] * len(rows), [prefix])
    return SharedPrefixes([-1] * len(rows))


def _up_to_images(rows: Sequence[Row]) -> dict[int, tuple[Row, int]]:
    """By number, the prompts with images and text after them, and where the last image ends."""
    found = {}
    for prompt, row in enumerate(rows):
        visual = np.flatnonzero(row.image >= 0)
        if row.pixels is not None and len(visual) and visual[-1] < len(row) - 1:
            found[prompt] = row, int(visual[-1]) + 1
    return found


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
    return rows[0][:size].replace(pixels=None, roi=None)


def _stand_alone(tuning: Tuning, rows: Iterable[tuple[Row, int]]) -> bool:
    """Whether the methods treat the first tokens of each row independently of the rest of it.

    Args:
      tuning: The attached methods.
      rows: Each row with the number of its first tokens.
    """
    seen, later, cut = set(), set(), False
    for row, size in rows:
        seen |= set(row.kind[:size].tolist())
        later |= set(row.kind[size:].tolist())
        # The first tokens end with the last one before an answer that the prompt holds.
        cut |= row.kind[size] == TokenKind.ANSWER
    for _, method in tuning.methods:
        if isinstance(method, WeightDelta) and method.sees_tokens:
            return False
        if not isinstance(method, Edit):
            continue
        for region, part in parse_selector(method.positions).parts:
            kinds = set(REGIONS.get(region, ()))
            # A slice of a region that ends before the rest begins is the same slice.
            if not part.whole and kinds & seen and kinds & later:
                return False
            if region == "last_prompt" and cut:
                return False
    return True


def _acts(tuning: Tuning, rows: Iterable[tuple[Row, int]]) -> bool:
    """Whether adapters may differ in the first tokens of some row, which go on afterwards.

    Args:
      tuning: The attached methods.
      rows: Each row with the number of its first tokens.
    """
    seen = {kind for row, size in rows for kind in row.kind[:size].tolist()}
    if tuning.connector and TokenKind.IMAGE in seen:
        return True
    for key, method in tuning.methods:
        if not isinstance(method, Edit):
            return True
        if not all(site.startswith("llm.") for site in tuning.params[key]):
            return True
        for region, _ in parse_selector(method.positions).parts:
            kinds = {TokenKind.ANSWER} if region == "last_prompt" else REGIONS.get(region)
            if kinds is None or not seen.isdisjoint(kinds):
                return True
    return False
