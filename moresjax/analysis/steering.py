"""Steering vectors from hidden states, and how selective a vector is.

Source: "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering", section 5 and
appendix B. A vector `s` is added to states, `h + alpha s` (the method `steer`).

| vector | formula |
|---|---|
| coarse | `mean(target states) - mean(source states)` |
| fine | `s[i, j] = u_j - u_i` for concepts `u` of the source states: towards concept j |
| contrast | mean or principal direction of pairs of states, as in the library repeng |

Axis legend: N, M states, D hidden size, K concepts.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError, choice_error

CONTRASTS = ("mean", "pca_diff", "pca_center")
TOP = 5  # answers that a selection score looks at


def _checked(states: Float[np.ndarray, "N D"], name: str) -> Float[np.ndarray, "N D"]:
    """States in double precision.

    Raises:
      UserError: There are none, or one is not finite.
    """
    if states.ndim != 2 or not len(states):
        raise UserError(f"there are no {name} states to make a vector of")
    if not np.isfinite(states).all():
        raise UserError(f"{name} states are not all finite; leave such samples out")
    return np.asarray(states, np.float64)


def coarse(
    source: Float[np.ndarray, "N D"], target: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, " D"]:
    """The vector from the mean of some states to the mean of others, in fp32.

    >>> coarse(np.zeros((3, 2)), np.array([[1.0, 0.0], [3.0, 0.0]])).tolist()
    [2.0, 0.0]

    Args:
      source: The states to steer away from.
      target: The states to steer to.

    Raises:
      UserError: A side has no states, or states that are not finite.
    """
    moved = _checked(target, "target").mean(0) - _checked(source, "source").mean(0)
    return moved.astype(np.float32)


def fine(concepts: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K K D"]:
    """`u_j - u_i` at `[i, j]` for all pairs of concepts: the vector from concept i to concept j.

    >>> fine(np.array([[1.0, 0.0], [0.0, 1.0]]))[0, 1].tolist()
    [-1.0, 1.0]

    Args:
      concepts: Concepts of the states to steer away from.
    """
    vectors = np.asarray(concepts, np.float32)
    return vectors[None] - vectors[:, None]


def contrast(
    positive: Float[np.ndarray, "N D"], negative: Float[np.ndarray, "M D"], method: str = "mean"
) -> Float[np.ndarray, " D"]:
    """The direction of pairs of states, from the negative to the positive ones.

    `mean` is the mean difference. The others are first principal components of length 1, with
    the sign for which most positive states lie further along them: `pca_center` of both states of a
    pair minus their middle, `pca_diff` of the differences. A principal component leaves the mean of
    its data out, so `pca_diff` sees how differences differ, and `pca_center` what they share.

    >>> positive = np.array([[1.0, 0.1], [1.0, -0.1]])
    >>> contrast(positive, -positive, "pca_center").round(2).tolist()
    [1.0, 0.0]

    Args:
      positive: The state of each pair to steer to.
      negative: The other state of each pair.
      method: `mean`, `pca_diff` or `pca_center`.

    Raises:
      UserError: The method is unknown, or states do not come in pairs, are not finite or few.
    """
    if method not in CONTRASTS:
        raise choice_error("contrast", method, CONTRASTS)
    up, down = _checked(positive, "positive"), _checked(negative, "negative")
    if up.shape != down.shape:
        raise UserError(f"contrast pairs need as many positive states ({len(up)}) as negative ones")
    if method == "mean":
        return (up - down).mean(0).astype(np.float32)
    middle = (up + down) / 2
    data = up - down if method == "pca_diff" else np.concatenate([up - middle, down - middle])
    if len(data) < 2 or not np.ptp(data, axis=0).any():
        raise UserError(f"{method} needs pairs that differ from each other")
    centred = data - data.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    further = np.mean(up @ direction > down @ direction)
    closer = np.mean(up @ direction < down @ direction)
    return (direction if further >= closer else -direction).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which answers a vector leads to.

    Attributes:
      score: How many more answers its weakest main answer gained than the strongest other one.
      targets: The main answers, the largest gain first; none where no answer gained.
      changes: The largest changes of counts, by answer.
    """

    score: int | float
    targets: tuple[str, ...]
    changes: dict[str, int]


def count_changes(baseline: Sequence[str], steered: Sequence[str]) -> dict[str, int]:
    """How much more often each answer is given, over all answers of either side.

    >>> count_changes(["yes", "no"], ["no", "no"])
    {'yes': -1, 'no': 1}

    Args:
      baseline: Normalised answers without steering.
      steered: Normalised answers with it.
    """
    before, after = Counter(baseline), Counter(steered)
    return {answer: after[answer] - before[answer] for answer in {**before, **after}}


def selection(changes: Mapping[str, int], top: int = TOP) -> Selection:
    """The selection score of a vector from how counts of answers changed.

    The `top` largest changes are split in two clusters (the best 2-means in one dimension; equal
    changes stay together, and losses count as 0, so that a large one does not draw small gains to
    the largest). The main answers are the cluster of the largest, and the score is
    `min(main) - max(others)`, or `min(main)` where there are no others.

    >>> selection({"three": 60, "two": 3, "one": -70})
    Selection(score=57.0, targets=('three',), changes={'three': 60, 'two': 3, 'one': -70})

    Args:
      changes: Changes of counts by answer, as `count_changes` makes them.
      top: How many answers count.
    """
    ranked = sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:top]
    kept = dict(ranked)
    if not ranked or ranked[0][1] <= 0:
        return Selection(0.0, (), kept)
    values = np.array([value for _, value in ranked], float)
    cut = _best_cut(np.maximum(values, 0.0))
    others = values[cut:].max() if cut < len(values) else 0.0
    targets = tuple(answer for answer, _ in ranked[:cut])
    return Selection(float(values[cut - 1] - others), targets, kept)


def _best_cut(values: np.ndarray) -> int:
    """Where falling values are cut into two clusters of the least squared distances."""
    cuts = [cut for cut in range(1, len(values)) if values[cut - 1] > values[cut]]
    if not cuts:
        return len(values)

    def spread(cut: int) -> float:
        return sum(part.var() * len(part) for part in (values[:cut], values[cut:]))

    return min(cuts, key=spread)


def choose(
    selections: Mapping[str, Selection], *, targets: int = 1, keep: int = 5, unique: bool = False
) -> list[str]:
    """The names of the most selective vectors, the best first.

    >>> few, many = Selection(5, ("a",), {}), Selection(9, ("a", "b"), {})
    >>> choose({"few": few, "many": many, "again": few})
    ['again', 'few']

    Args:
      selections: The selection of each vector.
      targets: The most main answers that a vector may have.
      keep: The most vectors.
      unique: Whether vectors with the main answers of a better one are left out.

    Raises:
      UserError: A number is below 1.
    """
    if targets < 1 or keep < 1:
        raise UserError(f"targets and keep must be at least 1, got {targets} and {keep}")
    fits = [name for name, own in selections.items() if 1 <= len(own.targets) <= targets]
    ranked = sorted(fits, key=lambda name: (-selections[name].score, name))
    if unique:
        first = {frozenset(selections[name].targets): name for name in reversed(ranked)}
        ranked = [name for name in ranked if first[frozenset(selections[name].targets)] == name]
    return ranked[:keep]


def controls(
    source: Float[np.ndarray, "N D"], target: Float[np.ndarray, "M D"], seed: int = 0
) -> dict[str, Float[np.ndarray, " D"]]:
    """What a coarse vector has to be better than.

    `random` has its norm and a random direction, `shuffled` is the vector between the same states
    with source and target drawn at random, and `reversed` is `-s`.

    >>> source, target = np.zeros((4, 3)), np.ones((4, 3))
    >>> found = controls(source, target)
    >>> bool(np.isclose(np.linalg.norm(found["random"]), 3**0.5)), found["reversed"].tolist()
    (True, [-1.0, -1.0, -1.0])

    Args:
      source: The states to steer away from.
      target: The states to steer to.
      seed: Seeds both draws.
    """
    vector, rng = coarse(source, target), np.random.default_rng(seed)
    mixed = rng.permutation(np.concatenate([source, target]))
    return {
        "random": random_like(vector, seed),
        "shuffled": coarse(mixed[: len(source)], mixed[len(source) :]),
        "reversed": -vector,
    }


def random_like(vector: Float[np.ndarray, " D"], seed: int = 0) -> Float[np.ndarray, " D"]:
    """A vector of the same norm in a random direction."""
    drawn = np.random.default_rng(seed).standard_normal(vector.shape)
    return (drawn * (np.linalg.norm(vector) / np.linalg.norm(drawn))).astype(np.float32)


def subsampled(
    source: Float[np.ndarray, "N D"],
    target: Float[np.ndarray, "M D"],
    sizes: Sequence[int],
    *,
    draws: int = 5,
    seed: int = 0,
) -> dict[int, Float[np.ndarray, "R D"]]:
    """Coarse vectors of few states, drawn several times without replacement.

    >>> states = np.random.default_rng(0).standard_normal((2, 30, 4))
    >>> {size: found.shape for size, found in subsampled(*states, [5, 10], draws=3).items()}
    {5: (3, 4), 10: (3, 4)}

    Args:
      source: The states to steer away from.
      target: The states to steer to.
      sizes: How many states of each side a vector is made of.
      draws: How many vectors of every size.
      seed: Seeds the draws.

    Raises:
      UserError: A size is below 1 or above the number of states of a side.
    """
    most = min(len(source), len(target))
    for size in sizes:
        if not 1 <= size <= most:
            raise UserError(f"vectors of {size} states a side: there are 1 to {most}")
    rng = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        rows = (rng.permutation(len(side))[:size] for side in (source, target))
        return coarse(source[next(rows)], target[next(rows)])

    return {size: np.stack([draw(size) for _ in range(draws)]) for size in sizes}


@dataclasses.dataclass(frozen=True)
class SideEffects:
    """What steering does to the answers that it is about, and to the others.

    Attributes:
      n: All answers.
      source: How many are the source's without steering.
      success: The share of these that become the target's; None without any.
      kept: The share of the other answers that stay as they are; None without any.
      changed: The share of all answers that change.
      accuracy: The mean score of the other answers before and after, where scores are known.
      distinct: How many different answers there are before and after.
      targets: How many answers are the target's before and after.
    """

    n: int
    source: int
    success: float | None
    kept: float | None
    changed: float
    accuracy: tuple[float, float] | None
    distinct: tuple[int, int]
    targets: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self)


def side_effects(
    baseline: Sequence[str],
    steered: Sequence[str],
    is_source: Callable[[str], bool],
    is_target: Callable[[str], bool],
    scores: tuple[Sequence[int | float], Sequence[int | float]] | None = None,
) -> SideEffects:
    """How many answers of the source become the target's, and what happens to the others.

    >>> found = side_effects(
    ...     ["yes", "yes", "red", "two"], ["no", "yes", "red", "no"], "yes".__eq__, "no".__eq__
    ... )
    >>> found.success, found.kept, found.changed
    (0.5, 0.5, 0.5)

    Args:
      baseline: Normalised answers without steering.
      steered: Normalised answers to the same questions with it.
      is_source: Whether an answer is one to steer away from.
      is_target: Whether an answer is one to steer to.
      scores: The scores of both, if there are some.

    Raises:
      UserError: There are no answers.
    """
    if not baseline or len(baseline) != len(steered):
        raise UserError(f"side effects of {len(steered)} answers against {len(baseline)}")
    own = np.array([is_source(answer) for answer in baseline])
    hit = np.array([is_target(answer) for answer in steered])
    same = np.array([a == b for a, b in zip(baseline, steered, strict=True)])
    accuracy = None
    if scores is not None and (~own).any():
        before, after = (float(np.asarray(s, float)[~own].mean()) for s in scores)
        accuracy = before, after
    return SideEffects(
        n=len(own),
        source=int(own.sum()),
        success=float(hit[own].mean()) if own.any() else None,
        kept=float(same[~own].mean()) if (~own).any() else None,
        changed=float(1 - same.mean()),
        accuracy=accuracy,
        distinct=(len({*baseline}), len({*steered})),
        targets=(sum(map(is_target, baseline)), int(hit.sum())),
    )
