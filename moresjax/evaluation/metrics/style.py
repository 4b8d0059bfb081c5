"""How many captions use the words of a list, such as colours: the style of captions.

A caption is split into words as the COCO caption evaluation does it. A list's entry of several
words counts where they stand in that order.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from moresjax.evaluation.metrics.ptb import tokenize


@dataclasses.dataclass(frozen=True)
class StyleCounts:
    """How often words of a list are used.

    Attributes:
      captions: How many captions have at least one of them.
      words: How many there are in all captions.
      by_word: The number of captions with each word that occurs, the most frequent first.
    """

    captions: int
    words: int
    by_word: dict[str, int]


def style_counts(captions: Sequence[str], words: Iterable[str]) -> StyleCounts:
    """Counts of the words of a list in captions.

    >>> style_counts(["A red kite, red!", "two dogs"], ["red", "blue"])
    StyleCounts(captions=1, words=2, by_word={'red': 1})

    Args:
      captions: The captions.
      words: The list.
    """
    wanted = {tuple(tokenize(word)): word for word in words}
    lengths = sorted({len(key) for key in wanted if key})
    by_word, total, hits = Counter(), 0, 0
    for caption in captions:
        said = tokenize(caption)
        found = [
            wanted[key]
            for length in lengths
            for start in range(len(said) - length + 1)
            if (key := tuple(said[start : start + length])) in wanted
        ]
        by_word.update({*found})
        total, hits = total + len(found), hits + bool(found)
    return StyleCounts(hits, total, dict(sorted(by_word.items(), key=lambda x: (-x[1], x[0]))))


def has_word(caption: str, words: Iterable[str]) -> bool:
    """Whether a caption uses a word of a list.

    >>> has_word("A red kite", ["red"]), has_word("A tired man", ["red"])
    (True, False)
    """
    return style_counts([caption], words).captions == 1
