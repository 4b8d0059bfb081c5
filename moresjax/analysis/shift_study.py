"""The shift between two runs' states, measured whole: vectors, words and samples.

Axis legend: N samples, D hidden size, K concepts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moresjax.analysis.concepts import Concepts, cosines
from moresjax.analysis.grounding import (
    ReadingModel,
    TextGrounding,
    WordFilter,
    ground_images,
    ground_text,
)
from moresjax.analysis.shift import (
    WORDS,
    Comparison,
    common_samples,
    consistency,
    control_shifts,
    match_nearest,
    recoveries,
    recovery,
    text_overlap,
)
from moresjax.analysis.state_rows import StateRows
from moresjax.analysis.states import States
from moresjax.core.errors import UserError

ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class ShiftOptions:
    """How a shift is measured.

    Attributes:
      alphas: The strengths of the shifts; 1 is always among them.
      how: The mean of a concept's shifts, as in `shift_vectors`.
      by: How samples are assigned to concepts: `activation`, `cosine` or `l2`.
      seed: The seed of the shuffles.
      words: Words of each concept.
      candidates: The tokens that they are sought among.
      norm: As in `ground_text`.
      word_filter: Which tokens are words.
      samples: Most activating samples of each concept.
      keywords: Words of the task that a model was tuned on.
    """

    alphas: Sequence[int | float] = ALPHAS
    how: str = "mean"
    by: str = "activation"
    seed: int = 0
    words: int = WORDS
    candidates: int = 200
    norm: str = "auto"
    word_filter: WordFilter = dataclasses.field(default_factory=WordFilter)
    samples: int = 50
    keywords: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not np.isfinite(list(self.alphas)).all():
            raise UserError(f"alphas must be finite numbers, got {list(self.alphas)}")
        object.__setattr__(self, "alphas", sorted({*map(float, self.alphas), 1.0}))


def measure_shift(
    base: States,
    tuned: States,
    base_concepts: Concepts,
    tuned_concepts: Concepts,
    options: ShiftOptions | None = None,
    model: ReadingModel | None = None,
) -> dict[str, Any]:
    """How a tuned model's concepts differ, and what shifts recover of them, beside the controls.

    >>> from moresjax.analysis.concepts import learn
    >>> rng = np.random.default_rng(0)
    >>> a = np.repeat(np.eye(3, 8), 9, axis=0) + 0.1 * rng.normal(size=(27, 8))
    >>> index, key = [{"id": str(n)} for n in range(27)], ("llm.norm.out", 0)
    >>> base, tuned = (States.from_arrays({key: x}, index) for x in (a, a + a[:, ::-1]))
    >>> found = measure_shift(base, tuned, learn(base, concepts=3), learn(tuned, concepts=3))
    >>> cosine = {name: rows[3]["cosine"] for name, rows in found["recovery"].items()}
    >>> found["n"], cosine["own"] > cosine["global"] > cosine["original"]
    (27, True)

    Args:
      base: The original model's states.
      tuned: The tuned model's, for the same questions.
      base_concepts: What was learned from the one.
      tuned_concepts: What was learned from the other, with as many concepts.
      options: How to measure.
      model: Its head reads the words of all concepts; without it there are none.

    Returns:
      `n` common samples; `recovery`, for `original`, `own`, `global` and `shuffled` a row for each
      alpha (the numbers of `recoveries`, `t_overlap`, `t_overlap_15` and `keywords` where there are
      words, and at alpha 1 `image_overlap`); `nearest`, the same concepts' cosine and T-Overlap
      with the most similar tuned ones; and `concepts`, a row for each.

    Raises:
      UserError: No sample is common, or the stores and dictionaries do not fit each other.
    """
    options = options or ShiftOptions()
    if len(base_concepts) != len(tuned_concepts):
        raise UserError(
            f"{len(base_concepts)} original concepts cannot be matched one to one with "
            f"{len(tuned_concepts)} tuned ones"
        )
    _check_same_tokens(base, tuned)
    a, b = _common_states(base, tuned, base_concepts)
    both = Comparison.of(
        a, b, base_concepts.assign(a, options.by), base_concepts.vectors, tuned_concepts.vectors
    )
    found: dict[str, Any] = {"n": len(a), "samples_of_base": len(base), "of_tuned": len(tuned)}
    found["recovery"] = recoveries(both, options.alphas, options.how, seed=options.seed)
    shifts = control_shifts(a, b, both.labels, len(base_concepts), options.how, seed=options.seed)
    own = shifts["own"][0]
    rows = _concept_rows(both, own)
    words = None
    if model is not None:
        read = _reader(model, base_concepts.facts.get("site"), options)
        words = _add_words(found, rows, both, shifts, read, options)
    found["nearest"] = _nearest(both, words)
    _add_images(found, rows, base, tuned, (base_concepts, tuned_concepts), both, shifts, options)
    found["concepts"] = rows
    return found


def _check_same_tokens(base: States, tuned: States) -> None:
    """Refuses states of other tokenizers or templates."""
    mine, other = base.meta.get("processor"), tuned.meta.get("processor")
    if None not in (mine, other) and mine != other:
        raise UserError(
            "the two runs' states were read with different tokenizers, templates or image "
            "processors, so that they are not about the same tokens"
        )


def _common_states(
    base: States, tuned: States, concepts: Concepts
) -> tuple[np.ndarray, np.ndarray]:
    """The states `[N, D]` of the samples that are found in both."""
    site, layer = concepts.facts.get("site"), concepts.facts.get("layer")
    in_base, in_tuned = common_samples(base, tuned)
    a = StateRows(base.take(in_base), site, layer)
    b = StateRows(tuned.take(in_tuned), site, layer)
    if a.size != b.size:
        raise UserError(f"the original states have {a.size} features, the tuned ones {b.size}")
    return a.all(), b.all()


def _concept_rows(both: Comparison, own: np.ndarray) -> list[dict[str, Any]]:
    """What is known of each concept from vectors alone."""
    moved = recovery(both.base, both.base + own, both.tuned)
    before = recovery(both.base, both.base, both.tuned)
    spread = consistency(both.a, both.b, both.labels, len(both.base))
    nearest = match_nearest(both.base, both.tuned)
    rows = []
    for k, (match, alike) in enumerate(zip(both.match, spread, strict=True)):
        there = alike.n > 0
        rows.append(
            {
                "match": int(match),
                "nearest": int(both.match[nearest[k]]),
                **dataclasses.asdict(alike),
                "cosine": {
                    "original": float(before.cosine[k]),
                    "own": float(moved.cosine[k]) if there else None,
                },
                "relative_gain": _finite(moved.relative_gain[k]) if there else None,
                "relative_distance_gain": _finite(moved.relative_distance_gain[k])
                if there
                else None,
                "words": None,
                "t_overlap": None,
                "image_overlap": None,
            }
        )
    return rows


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


Read = Callable[[np.ndarray], list[list[str]]]


def _reader(model: ReadingModel, site: str | None, options: ShiftOptions) -> Read:
    def read(vectors: np.ndarray) -> list[list[str]]:
        found: TextGrounding = ground_text(
            model,
            vectors.astype(np.float32),
            words=options.words,
            candidates=options.candidates,
            norm=options.norm,
            site=site,
            word_filter=options.word_filter,
        )
        return found.words

    return read


def _add_words(
    found: dict[str, Any],
    rows: list[dict[str, Any]],
    both: Comparison,
    shifts: dict[str, list[np.ndarray]],
    read: Read,
    options: ShiftOptions,
) -> tuple[list[list[str]], list[list[str]]]:
    """Adds T-Overlap with the matches and the share of keywords; returns the two runs' words."""
    original, tuned = read(both.base), read(both.tuned)
    kept = np.flatnonzero(both.has_samples)
    for name, draws in shifts.items():
        for point in found["recovery"][name]:
            moved = [read(both.base + point["alpha"] * draw) for draw in draws]
            overlap = functools.partial(_overlaps, moved, tuned, kept)
            point["t_overlap"], point["t_overlap_15"] = overlap(), overlap(of=WORDS)
            keywords = [list(options.keywords)] * len(tuned)
            share = _overlaps(moved, keywords, kept) if options.keywords else None
            point["keywords"] = share
            if name == "own" and point["alpha"] == 1:
                for k, row in enumerate(rows):
                    texts = {"original": original[k], "own": moved[0][k], "tuned": tuned[k]}
                    row["words"] = texts
                    row["t_overlap"] = {
                        which: text_overlap(texts[which], tuned[k]) for which in ("original", "own")
                    }
    return original, tuned


def _overlaps(
    draws: list[list[list[str]]], others: list[list[str]], kept: np.ndarray, of: int | None = None
) -> float | None:
    """The mean T-Overlap of concepts that have samples."""
    values = [text_overlap(draw[k], others[k], of) for draw in draws for k in kept]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _nearest(
    both: Comparison, words: tuple[list[list[str]], list[list[str]]] | None
) -> dict[str, float | None]:
    """The original concepts beside the most similar tuned ones, which several may share."""
    similar = cosines(both.base, both.tuned)
    nearest = similar.argmax(1)
    overlap = None
    if words is not None:
        original, tuned = words
        overlap = _overlaps([original], [tuned[j] for j in nearest], np.arange(len(original)))
    return {"cosine": float(similar.max(1).mean()), "t_overlap": overlap}


def _add_images(
    found: dict[str, Any],
    rows: list[dict[str, Any]],
    base: States,
    tuned: States,
    dictionaries: tuple[Concepts, Concepts],
    both: Comparison,
    shifts: dict[str, list[np.ndarray]],
    options: ShiftOptions,
) -> None:
    """Adds the overlap of most activating samples at alpha 1.

    Those of shifted concepts are sought among the tuned states, as those of tuned concepts.
    """
    of_base, of_tuned = dictionaries
    if of_base.method == "sae":
        return  # a shifted decoder has no encoder
    target = ground_images(of_tuned, tuned, options.samples).ids
    target = [set(target[match]) for match in both.match]
    kept = np.flatnonzero(both.has_samples)
    for name, draws in shifts.items():
        if name == "original":
            grounded = [ground_images(of_base, base, options.samples).ids]
        else:
            moved = [of_base.moved(draw) for draw in draws]
            grounded = [ground_images(d, tuned, options.samples).ids for d in moved]
        shares = np.array(
            [
                [len(set(x) & y) / len(y) for x, y in zip(ids, target, strict=True)]
                for ids in grounded
            ]
        )
        for point in found["recovery"][name]:
            if point["alpha"] == 1:
                point["image_overlap"] = float(100 * shares[:, kept].mean())
        if name in ("original", "own"):
            for row, share in zip(rows, shares[0], strict=True):
                row["image_overlap"] = (row["image_overlap"] or {}) | {name: float(100 * share)}
