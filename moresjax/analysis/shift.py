"""How fine-tuning moves concepts, and how much of it a shift of the original ones recovers.

With `a_m` and `b_m` the states of sample m in the original and the tuned model, and `A_k` the
samples that are found in both and belong to concept k of the original: `delta_m = b_m - a_m`,
`Delta_k` their mean over `A_k`, and `u_k + alpha Delta_k` the shifted concept. Source: "Analyzing
Fine-tuning Representation Shift for Multimodal LLMs Steering", section 4 and appendix A.

Two controls belong to every number of recovery. Where concepts are means of clusters and all
samples are common, `u_k + Delta_k` *is* the mean of the tuned states over the cluster, so that an
alpha of 1 is near the best by construction: `global` moves all concepts by one vector, the mean of
all deltas, and `shuffled` moves each by the mean over samples drawn without regard to concepts.

Axis legend: N samples, D hidden size, K concepts.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moresjax.analysis.concepts import cosines, match_bijective
from moresjax.analysis.states import States
from moresjax.core.errors import UserError, choice_error

MEANS = ("mean", "median", "trimmed", "difference-of-medians", "difference-of-trimmed")
TRIMMED = 0.1  # share of the smallest and of the largest values that a trimmed mean leaves out
CONTROLS = ("original", "own", "global", "shuffled")
SHUFFLES = 5  # draws of the control `shuffled`, whose mean is reported
WORDS = 15  # by which the authors' figures divide


def common_samples(
    base: States, tuned: States
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The samples that are found in both stores, by their ids.

    >>> a = States.from_arrays({("llm.norm.out", 0): np.eye(2)}, [{"id": "x"}, {"id": "y"}])
    >>> b = States.from_arrays({("llm.norm.out", 0): np.eye(2)}, [{"id": "y"}, {"id": "z"}])
    >>> [rows.tolist() for rows in common_samples(a, b)]
    [[1], [0]]

    Args:
      base: The original model's states.
      tuned: The tuned model's.

    Returns:
      Their numbers in the one and in the other store, in the order of the first. Of a sample with
      several states the first belongs to the first, and so on.

    Raises:
      UserError: There are none.
    """
    places = {name: row for row, name in _names(tuned)}
    pairs = [(row, places[name]) for row, name in _names(base) if name in places]
    if not pairs:
        raise UserError(
            "no sample is found in both runs' states; ask both models the same questions, and "
            "choose a word that both say"
        )
    a, b = np.array(pairs).T
    return a, b


def _names(states: States) -> Iterable[tuple[int, tuple[str, int]]]:
    """The number of every state that was found, its sample's id and which of its states it is."""
    seen: dict[str, int] = {}
    for number, row in enumerate(states.index):
        name = str(row["id"])
        seen[name] = seen.get(name, -1) + 1
        if row.get("found", True):
            yield number, (name, seen[name])


def shift_vectors(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    concepts: int,
    how: str = "mean",
) -> Float[np.ndarray, "K D"]:
    """Delta of each concept; nan for a concept without samples.

    >>> a, b = np.zeros((3, 2)), np.array([[1.0, 0], [3, 0], [0, 5]])
    >>> shift_vectors(a, b, np.array([0, 0, 1]), 2).tolist()
    [[2.0, 0.0], [0.0, 5.0]]

    Args:
      a: The original states of common samples.
      b: The tuned ones.
      labels: The concept of each sample.
      concepts: K.
      how: `mean`, `median` or `trimmed` (by a tenth at both ends) of the deltas; or, as in the
        authors' code, `difference-of-medians` or `difference-of-trimmed` means of the states.

    Raises:
      UserError: There is no such mean.
    """
    if how not in MEANS:
        raise choice_error("mean of shifts", how, MEANS)
    out = np.full((concepts, a.shape[1]), np.nan)
    for k in range(concepts):
        members = np.flatnonzero(labels == k)
        own_a, own_b = (x[members].astype(np.float64) for x in (a, b))
        if len(own_a):
            out[k] = _middle(own_a, own_b, how)
    return out


def _middle(a: np.ndarray, b: np.ndarray, how: str) -> np.ndarray:
    from scipy.stats import trim_mean

    if how == "mean":
        return (b - a).mean(0)
    if how == "median":
        return np.median(b - a, axis=0)
    if how == "trimmed":
        return trim_mean(b - a, TRIMMED, axis=0)
    if how == "difference-of-medians":
        return np.median(b, axis=0) - np.median(a, axis=0)
    return trim_mean(b, TRIMMED, axis=0) - trim_mean(a, TRIMMED, axis=0)


def control_shifts(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    concepts: int,
    how: str = "mean",
    *,
    seed: int = 0,
) -> dict[str, list[Float[np.ndarray, "K D"]]]:
    """The shifts of `own`, and of the controls `original` (none), `global` and `shuffled`.

    Args:
      a: The original states of common samples.
      b: The tuned ones.
      labels: The concept of each sample.
      concepts: K.
      how: As in `shift_vectors`.
      seed: The seed of the shuffles.

    Returns:
      For each of these names a list of shifts, whose results are averaged. A concept without
      samples moves by nothing.
    """
    rng = np.random.default_rng(seed)
    one = shift_vectors(a, b, np.zeros(len(a), int), 1, how)
    drawn = [shift_vectors(a, b, rng.permutation(labels), concepts, how) for _ in range(SHUFFLES)]
    own = shift_vectors(a, b, labels, concepts, how)
    there = np.bincount(labels, minlength=concepts)[:, None] > 0
    return {
        "original": [np.zeros_like(own)],
        "own": [np.nan_to_num(own)],
        "global": [np.where(there, one, 0)],
        "shuffled": [np.nan_to_num(x) for x in drawn],
    }


def match_nearest(
    a: Float[np.ndarray, "K D"], b: Float[np.ndarray, "J D"]
) -> Int[np.ndarray, " K"]:
    """For each concept of `a` the most similar one of `b`, which several may share."""
    return cosines(a, b).argmax(1)


def text_overlap(
    words: Sequence[str], others: Sequence[str], of: int | None = None
) -> float | None:
    """T-Overlap in percent: `100 |T n T'| / |T|`.

    >>> text_overlap(["dog", "cat"], ["cat", "sun"]), text_overlap([], ["cat"])
    (50.0, None)

    Args:
      words: T.
      others: T'.
      of: What to divide by instead of `|T|`; the authors' figures have 15.

    Returns:
      None where there is nothing to divide by.
    """
    own = set(words)
    size = of or len(own)
    return 100 * len(own & set(others)) / size if size else None


@dataclasses.dataclass(frozen=True)
class Consistency:
    """How alike the shifts of a concept's samples are; None where it has too few samples.

    Attributes:
      n: How many common samples the concept has.
      cosine_with_mean: Mean cosine of the deltas with Delta (appendix A.5).
      pairwise_cosine: Mean cosine of two deltas (what the authors' figures show).
      magnitude: Norm of Delta.
      mean_magnitude: Mean norm of the deltas.
      std_magnitude: Their standard deviation.
    """

    n: int
    cosine_with_mean: float | None
    pairwise_cosine: float | None
    magnitude: float | None
    mean_magnitude: float | None
    std_magnitude: float | None


def consistency(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    concepts: int,
) -> list[Consistency]:
    """How consistent the shifts of each concept are.

    >>> a, b = np.zeros((2, 2)), np.array([[3.0, 0], [0, 4]])
    >>> (found,) = consistency(a, b, np.array([0, 0]), 1)
    >>> found.magnitude, found.pairwise_cosine, found.mean_magnitude
    (2.5, 0.0, 3.5)

    Args:
      a: The original states of common samples.
      b: The tuned ones.
      labels: The concept of each sample.
      concepts: K.
    """
    out = []
    for k in range(concepts):
        deltas = b[labels == k].astype(np.float64) - a[labels == k]
        n = len(deltas)
        if not n:
            out.append(Consistency(0, None, None, None, None, None))
            continue
        mean, norms = deltas.mean(0), np.linalg.norm(deltas, axis=1)
        units = np.divide(
            deltas, norms[:, None], where=norms[:, None] > 0, out=np.zeros_like(deltas)
        )
        # The sum of all pairs' cosines is the square of the sum, less those of each with itself.
        pairs = (np.square(units.sum(0)).sum() - np.square(units).sum()) / max(n * (n - 1), 1)
        out.append(
            Consistency(
                n,
                float(cosines(deltas, mean[None]).mean()),
                float(pairs) if n > 1 else None,
                float(np.linalg.norm(mean)),
                float(norms.mean()),
                float(norms.std(ddof=1)) if n > 1 else None,
            )
        )
    return out


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How near concepts are to their matches in the tuned model `[K]`.

    Attributes:
      cosine: Their cosine similarity.
      distance: Their distance.
      gain: The cosine minus that of the original concepts.
      relative_gain: The gain over the original cosine.
      distance_gain: The original distance minus theirs.
      relative_distance_gain: This over the original distance; nan where that is 0.
    """

    cosine: Float[np.ndarray, " K"]
    distance: Float[np.ndarray, " K"]
    gain: Float[np.ndarray, " K"]
    relative_gain: Float[np.ndarray, " K"]
    distance_gain: Float[np.ndarray, " K"]
    relative_distance_gain: Float[np.ndarray, " K"]


def recovery(
    original: Float[np.ndarray, "K D"],
    shifted: Float[np.ndarray, "K D"],
    tuned: Float[np.ndarray, "K D"],
) -> Recovery:
    """How much nearer shifted concepts are to those of the tuned model.

    >>> recovery(np.array([[1.0, 0]]), np.array([[1.0, 1]]), np.array([[0.0, 1]])).gain.round(3)
    array([0.707])

    Args:
      original: The original concepts.
      shifted: The same, shifted.
      tuned: The concept of the tuned model that each is matched with.
    """
    before, after = (_paired_cosines(x, tuned) for x in (original, shifted))
    far, near = (np.linalg.norm(x - tuned, axis=1) for x in (original, shifted))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_distance = (after - before) / before, (far - near) / far
    return Recovery(after, near, after - before, relative, far - near, relative_distance)


def _paired_cosines(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " K"]:
    return np.array([cosines(x[None], y[None])[0, 0] for x, y in zip(a, b, strict=True)])


def correlation(x: Sequence[int | float | None], y: Sequence[int | float | None]) -> dict[str, Any]:
    """Pearson's r and its p-value over the pairs that are numbers.

    >>> round(correlation([1, 2, 3, None], [2, 4, 6, 1])["r"], 6)
    1.0
    >>> correlation([1, 2], [1, 2])
    {'r': None, 'p': None, 'n': 2}

    Returns:
      `r`, `p` and `n`; None for fewer than three pairs, or a constant.
    """
    from scipy.stats import pearsonr

    both = [(u, v) for u, v in zip(x, y, strict=True) if u is not None and v is not None]
    pairs = np.array(both, np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(1)]
    if len(pairs) < 3 or (pairs.std(0) <= 1e-9 * np.abs(pairs).max(0)).any():
        return {"r": None, "p": None, "n": len(pairs)}
    found: Any = pearsonr(pairs[:, 0], pairs[:, 1])
    return {"r": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}


def correlations(points: Mapping[str, tuple[Sequence, Sequence]]) -> dict[str, dict[str, Any]]:
    """`correlation` of each tuned model, and of all together under `overall`.

    Args:
      points: For each tuned model its x and y.
    """
    found = {name: correlation(x, y) for name, (x, y) in points.items()}
    xs, ys = ([v for pair in points.values() for v in pair[i]] for i in (0, 1))
    return found | {"overall": correlation(xs, ys)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Common samples of two runs, concepts of both, and how they belong together.

    Attributes:
      a: The original states of the common samples.
      b: The tuned ones.
      labels: The original concept of each.
      base: The original concepts.
      tuned: The tuned model's, in the order of their matches.
      match: The number of each match among the tuned model's own.
    """

    a: Float[np.ndarray, "N D"]
    b: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, " N"]
    base: Float[np.ndarray, "K D"]
    tuned: Float[np.ndarray, "K D"]
    match: Int[np.ndarray, " K"]

    @classmethod
    def of(
        cls,
        a: Float[np.ndarray, "N D"],
        b: Float[np.ndarray, "N D"],
        labels: Int[np.ndarray, " N"],
        base: Float[np.ndarray, "K D"],
        tuned: Float[np.ndarray, "K D"],
    ) -> "Comparison":
        """With the tuned concepts in the order of their matches, one to one."""
        match = match_bijective(base, tuned)
        return cls(a, b, labels, base, tuned[match], match)

    @property
    def has_samples(self) -> Bool[np.ndarray, " K"]:
        """Whether each original concept has a common sample."""
        return np.bincount(self.labels, minlength=len(self.base)) > 0


def recoveries(
    comparison: Comparison,
    alphas: Sequence[int | float] = (1.0,),
    how: str = "mean",
    *,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Recovery by `own` shifts beside the controls, for several alphas.

    >>> a = np.array([[1.0, 0], [0, 1]])
    >>> both = Comparison.of(a, a + 1, np.array([0, 1]), a, a + 1)
    >>> round(recoveries(both)["own"][0]["cosine"], 6)
    1.0

    Args:
      comparison: The runs.
      alphas: The strengths of the shifts.
      how: As in `shift_vectors`.
      seed: The seed of the shuffles.

    Returns:
      For `original`, `own`, `global` and `shuffled` a row for each alpha: `alpha`, and of all
      concepts with common samples the mean `cosine`, `gain`, `relative_gain`, `distance`,
      `distance_gain` and `relative_distance_gain`, and `improved`, the share whose cosine rose.
    """
    kept = comparison.has_samples
    shifts = control_shifts(
        comparison.a, comparison.b, comparison.labels, len(comparison.base), how, seed=seed
    )
    out: dict[str, list[dict[str, Any]]] = {}
    for name, draws in shifts.items():
        for alpha in alphas:
            moved = [comparison.base + alpha * draw for draw in draws]
            found = [recovery(comparison.base, x, comparison.tuned) for x in moved]
            row = {
                field.name: _mean([getattr(one, field.name)[kept] for one in found])
                for field in dataclasses.fields(Recovery)
            }
            improved = _mean([(one.gain[kept] > 0) for one in found])
            out.setdefault(name, []).append({"alpha": float(alpha), **row, "improved": improved})
    return out


def _mean(values: Sequence[np.ndarray]) -> float | None:
    """The mean of what is finite; None without any."""
    flat = np.concatenate(values).astype(np.float64)
    flat = flat[np.isfinite(flat)]
    return float(flat.mean()) if len(flat) else None
