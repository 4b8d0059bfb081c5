"""Which type an answer has, learned from answers whose questions have one: VQAv2's answer types."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from moresjax.evaluation.metrics.vqa import normalize_vqa

UNKNOWN = "unrecognised"


def type_map(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The type of every normalised answer: the one that most of its questions have.

    >>> type_map([("Two", "number"), ("2", "number"), ("2", "other"), ("red", "other")])
    {'2': 'number', 'red': 'other'}

    Args:
      pairs: Answers, such as those of a training split, with the types of their questions.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for answer, kind in pairs:
        counts[normalize_vqa(answer)][kind] += 1
    # Of equally frequent types the first in the alphabet, whatever the order of the questions.
    return {
        answer: min(found, key=lambda kind: (-found[kind], kind))
        for answer, found in counts.items()
    }


def answer_type(answer: str, types: Mapping[str, str]) -> str:
    """The type of an answer; `unrecognised` for one that the map does not have."""
    return types.get(normalize_vqa(answer), UNKNOWN)


def type_counts(answers: Sequence[str], types: Mapping[str, str]) -> dict[str, int]:
    """How many answers have each type of a map, and how many none.

    >>> type_counts(["2", "two", "teal"], {"2": "number", "red": "other"})
    {'number': 2, 'other': 0, 'unrecognised': 1}
    """
    counts = Counter(answer_type(answer, types) for answer in answers)
    return {kind: counts[kind] for kind in [*sorted({*types.values()}), UNKNOWN]}
