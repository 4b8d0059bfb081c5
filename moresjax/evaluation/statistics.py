"""How sure a mean over questions is: standard errors clustered by image, and intervals.

Answers to questions about one image are no independent draws. With residuals `r_i` of `n` scores
from their mean and `G` groups of questions that share images, the squared standard error is
`G / (G - 1) * sum_g (sum_{i in g} r_i)^2 / n^2`: the cluster-robust variance of a regression on a
constant (Liang & Zeger 1986; Cameron & Miller 2015). Where no image is shared it is the usual one,
`s^2 / n`.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from scipy.special import stdtrit

from moresjax.data.images import image_keys
from moresjax.evaluation.examples import Example

# Independent draws that the interval of a difference needs; fewer may agree by chance.
LEAST_CLUSTERS = 10


def image_clusters(examples: Sequence[Example]) -> list[int]:
    """For every example the number of its cluster: those that share an image have the same one.

    An example without images is a cluster of its own. Sharing goes on: where one example shows two
    images, all examples about either are in its cluster.

    >>> questions = [Example("1", "?", images=("a.jpg",)), Example("2", "?"),
    ...              Example("3", "?", images=("a.jpg", "b.jpg"))]
    >>> image_clusters(questions)
    [0, 1, 0]
    """
    first_with: dict[Hashable, int] = {}
    parents = list(range(len(examples)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for number, example in enumerate(examples):
        for key in image_keys(example.images):
            low, high = sorted((root(number), root(first_with.setdefault(key, number))))
            parents[high] = low
    return [root(number) for number in range(len(examples))]


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of the mean of scores in clusters; None for fewer than two clusters.

    >>> clustered_stderr([1.0, 0.0, 1.0, 1.0], "abcd"), clustered_stderr([1.0, 0.0], "aa")
    (0.25, None)

    Args:
      values: The scores.
      clusters: For every score the name of its cluster.
    """
    count = len(set(clusters))
    if count < 2:
        return None
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    squares = math.fsum(total * total for total in sums.values())
    return math.sqrt(count / (count - 1) * squares) / len(values)


def interval(
    mean: float, stderr: float, clusters: int | None = None, *, share: bool = False
) -> tuple[float, float]:
    """The 95% confidence interval of a mean.

    >>> low, high = interval(0.75, 0.25, clusters=4, share=True)
    >>> round(low, 4), high
    (0.0, 1.0)

    Args:
      mean: The mean.
      stderr: Its standard error.
      clusters: The number of independent draws: the quantile is that of Student's t with one degree
        of freedom less. None takes the normal distribution.
      share: Whether the mean is a share, which lies between 0 and 1.
    """
    degrees = math.inf if clusters is None else clusters - 1
    width = float(stdtrit(degrees, 0.975)) * stderr
    low, high = mean - width, mean + width
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two models' values for the same questions.

    Attributes:
      mean: The mean of the first model's values less the second's.
      low: Where its 95% confidence interval begins.
      high: Where it ends.
      n: The number of questions.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> Difference | None:
    """The mean of paired differences with its interval; None for too few independent questions.

    >>> paired_difference([1.0, 1.0, 0.0, 1.0] * 5, [0.0, 1.0, 0.0, 1.0] * 5, range(20)).is_shown
    True
    >>> paired_difference([1.0] * 4, [0.0] * 4, range(4)) is None
    True

    Args:
      first: A value of the first model for every question.
      second: The values of the second model for the same questions.
      clusters: For every question the name of its cluster.
    """
    count = len(set(clusters))
    if count < LEAST_CLUSTERS:
        return None
    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean = math.fsum(differences) / len(differences)
    error = clustered_stderr(differences, clusters)
    assert error is not None  # there are several clusters
    return Difference(mean, *interval(mean, error, count), len(differences))
