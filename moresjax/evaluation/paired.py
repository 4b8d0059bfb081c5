"""Whether two models differ on the same questions: intervals and tests of paired scores.

Questions about one image are no independent draws, so images are drawn again and images change
sides, with all of their questions (cluster bootstrap, Cameron, Gelbach & Miller 2008; sign-flip
test). For scores of 0 and 1 where no image is shared the sign-flip test is McNemar's, whose exact
version is a binomial test (McNemar 1947). Several comparisons are corrected as Holm (1979) does.
"""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import bdtr

RESAMPLES = 10_000
EXACT = 14  # clusters of which all sign patterns are tried
CHUNK = 1 << 22  # draws held at a time
LEVEL = 0.05  # of p-values after the correction
# Said wherever sentences follow from these intervals.
OF_ONE_SEED = (
    "Intervals are over questions to one training run each; how far another seed of training would "
    "move the scores is not in them."
)


def cluster_sums(
    values: Sequence[int | float], clusters: Sequence[Hashable]
) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """The sum and the number of the values of every cluster."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums = np.bincount(index, weights=np.asarray(values, float), minlength=len(numbers))
    return sums, np.bincount(index, minlength=len(numbers)).astype(float)


def bootstrap_interval(
    differences: Sequence[int | float],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95% percentile interval of the mean difference when clusters are drawn again.

    >>> low, high = bootstrap_interval([1.0, 0.0, 0.0, 0.0] * 25, range(100)) or (0, 0)
    >>> 0.15 < low < 0.19 < 0.31 < high < 0.35
    True

    Args:
      differences: For every question the score of one model minus that of the other.
      clusters: For every question the name of its cluster.
      resamples: How often as many clusters as there are are drawn with replacement.
      seed: Seeds the draws.

    Returns:
      None for fewer than two clusters.
    """
    sums, sizes = cluster_sums(differences, clusters)
    if len(sums) < 2:
        return None
    rng, means = np.random.default_rng(seed), []
    for count in _chunks(resamples, len(sums)):
        drawn = rng.integers(len(sums), size=(count, len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _chunks(total: int, width: int) -> list[int]:
    size = max(CHUNK // width, 1)
    return [min(size, total - start) for start in range(0, total, size)]


def mcnemar(first: Sequence[int | float], second: Sequence[int | float]) -> float:
    """The two-sided p-value of McNemar's exact test of paired scores of 0 and 1.

    >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    0.0625

    Args:
      first: The scores of one model.
      second: Those of the other, for the same questions in the same order.
    """
    differences = np.asarray(first, float) - np.asarray(second, float)
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    return min(1.0, 2.0 * float(bdtr(min(up, down), up + down, 0.5)))


def sign_flip(
    differences: Sequence[int | float],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """The two-sided p-value of no difference, under which the sign of each cluster is a coin.

    >>> sign_flip([0.5, 0.5, 0.25], "aab")
    0.5

    Args:
      differences: For every question the score of one model minus that of the other.
      clusters: For every question the name of its cluster.
      resamples: The number of sign patterns drawn where there are too many to try all.
      seed: Seeds the draws.
    """
    sums = cluster_sums(differences, clusters)[0]
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    reached = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if len(sums) <= EXACT:
        signs = np.asarray(list(itertools.product((-1.0, 1.0), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= reached).mean())
    rng, count = np.random.default_rng(seed), 0
    for rows in _chunks(resamples, len(sums)):
        signs = rng.integers(0, 2, size=(rows, len(sums))) * 2.0 - 1.0
        count += int((np.abs(signs @ sums) >= reached).sum())
    return (count + 1) / (resamples + 1)


def holm(p_values: Sequence[int | float]) -> list[float]:
    """P-values corrected for their number, in the same order.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def is_shown(interval: tuple[float, float] | None, p: float) -> bool:
    """Whether a difference is shown: its interval is without zero, and so is the corrected test.

    >>> is_shown((0.1, 0.3), 0.01), is_shown((0.1, 0.3), 0.2), is_shown(None, 0.01)
    (True, False, False)
    """
    low, high = interval or (0.0, 0.0)
    return (low > 0 or high < 0) and p < LEVEL
