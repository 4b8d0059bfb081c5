"""How sure a mean over questions is: standard errors clustered by image, and intervals.

Answers to questions about one image are no independent draws. With residuals `r_i` of `n` scores
from their mean and `G` groups of questions that share images, the squared standard error is
`G / (G - 1) * sum_g (sum_{i in g} r_i)^2 / n^2`: the cluster-robust variance of a regression on a
constant (Liang & Zeger 1986; Cameron & Miller 2015). Where no image is shared it is the usual one,
`s^2 / n`.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence

from scipy.special import stdtrit

from moresjax.data.images import image_keys
from moresjax.evaluation.examples import Example


def image_clusters(examples: Sequence[Example]) -> list[int]:
    """For every example the number of its cluster: those that share an image have the same one.

    An example without images is a cluster of its own. Sharing goes on: where one example shows two
    images, all examples about either are in its cluster.

    >>> questions = [Example("1", "?", images=("a.jpg",)), Example("2", "?"),
    ...              Example("3", "?", images=("a.jpg", "b.jpg"))]
    >>> image_clusters(questions)
    [0, 1, 0]
    """
    return clusters_of([example.images for example in examples])


def clusters_of(images: Sequence[Sequence]) -> list[int]:
    """`image_clusters` of examples that are known by their images alone.

    >>> clusters_of([("a.jpg",), (), ("a.jpg", "b.jpg")])
    [0, 1, 0]
    """
    first_with: dict[Hashable, int] = {}
    parents = list(range(len(images)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for number, shown in enumerate(images):
        for key in image_keys(shown):
            low, high = sorted((root(number), root(first_with.setdefault(key, number))))
            parents[high] = low
    return [root(number) for number in range(len(images))]


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


def mean_with_interval(
    values: Sequence[float], *, share: bool = False
) -> tuple[float, tuple[float, float] | None]:
    """The mean of independent draws, such as seeds, and its 95% interval by Student's t.

    >>> mean, (low, high) = mean_with_interval([1.0, 2.0, 3.0])
    >>> mean, round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)

    Args:
      values: The draws.
      share: Whether each is a share, which lies between 0 and 1.

    Returns:
      The mean and the interval; None in its place for fewer than two draws.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    stderr = statistics.stdev(values) / len(values) ** 0.5
    return mean, interval(mean, stderr, len(values), share=share)
