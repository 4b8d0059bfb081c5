"""Sentences about methods, which follow from paired intervals over whole-pipeline seeds alone.

A seed is one of a whole pipeline: stages 0, 1 and 2 are trained with it. Methods of one seed start
from the same stages 0 and 1, so that their difference within a seed is what is compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from moresjax.evaluation.statistics import mean_with_interval
from moresjax.reports.tables import in_points

# Fewer seeds than these show no difference, however narrow their interval is.
MIN_SEEDS = 5
NOT_SHOWN = "no difference could be shown"


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference of two methods within seeds.

    Attributes:
      mean: The mean over seeds.
      interval95: Its 95% interval by Student's t; None for a single seed.
      seeds: The number of seeds.
    """

    mean: float
    interval95: tuple[float, float] | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float], others: Sequence[float]) -> "PairedDifference":
        """The difference of values from others of the same seeds.

        >>> PairedDifference.of([0.5, 0.75], [0.25, 0.5]).mean
        0.25
        """
        pairs = zip(values, others, strict=True)
        differences = [round(value - other, 12) for value, other in pairs]
        return cls(*mean_with_interval(differences), len(differences))

    @property
    def direction(self) -> str:
        """`higher` or `lower` where the interval excludes zero and seeds suffice; else empty."""
        low, high = self.interval95 or (0.0, 0.0)
        if self.seeds < MIN_SEEDS or low <= 0 <= high:
            return ""
        return "higher" if low > 0 else "lower"

    @property
    def points(self) -> str:
        """The difference in hundredths, with its interval.

        >>> PairedDifference(0.031, (0.01, 0.052), 5).points
        '+3.1 [+1.0, +5.2]'
        """
        return in_points(self.mean, self.interval95)


def compare_with(base: str, what: str, values: Mapping[str, Sequence[float]]) -> str:
    """A sentence on how every method differs from one of them.

    >>> print(compare_with("a", "Accuracy", {"a": [0.5] * 5, "b": [0.6] * 5}))
    Accuracy against a: higher with b (+10.0 [+10.0, +10.0]).

    Args:
      base: The method that the others are compared with.
      what: What the values are.
      values: By method the value of every seed.
    """
    found: dict[str, list[str]] = {"higher": [], "lower": [], "": []}
    for name, own in values.items():
        if name != base:
            difference = PairedDifference.of(own, values[base])
            found[difference.direction].append(f"{name} ({difference.points})")
    parts = [f"{word} with {listed(found[word])}" for word in ("higher", "lower") if found[word]]
    if found[""]:
        parts.append(f"{NOT_SHOWN} for {listed(found[''])}")
    return f"{what} against {base}: {'; '.join(parts)}."


def explain(seeds: int) -> str:
    """What the sentences rest on."""
    if seeds < MIN_SEEDS:
        count = "One seed shows" if seeds == 1 else f"{seeds} seeds show"
        return (
            f"{count} no difference between methods: repeat the whole pipeline, stages 0 to 2, "
            f"with --seeds {MIN_SEEDS} or more."
        )
    return (
        f"Differences are in points, the mean over {seeds} seeds of the whole pipeline (stages 0, "
        "1 and 2) and its 95% interval over the differences within seeds (Student's t); higher or "
        "lower is said only where the interval excludes zero."
    )


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
