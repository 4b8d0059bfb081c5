"""Scores an LLM judge gives: how its replies are read, and how the scores are summed.

- MM-Vet: Yu et al. 2023 and `yuweihao/MM-Vet`. The judge completes a table row with 0.0 to 1.0.
- MMHal-Bench: Sun et al. 2023. The judge rates 0 to 6; below 3 is a hallucination.
- HallusionBench's verdicts are in `hallusionbench.py`, the prompts in `judge_prompts.py`.

The `rule_*` functions stand in for a judge offline. Their scores are not comparable with a judge's.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from moresjax.core.errors import UserError

MMHAL_MAX = 6
_MMHAL_GOOD = 3  # The lowest rating that counts as free of hallucination.


def mm_vet_answer(answer: str) -> str:
    """A ground truth in the form that the judge sees, with blanks around `<AND>` and `<OR>`."""
    return answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")


def parse_mm_vet(reply: str) -> float | None:
    """The first word of a reply as a score in 0..1; None asks for another attempt.

    >>> parse_mm_vet("0.7 because"), parse_mm_vet("Good")
    (0.7, None)
    """
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def mm_vet_summary(
    scores: Mapping[str, Sequence[float]], capabilities: Mapping[str, Collection[str]]
) -> dict[str, float]:
    """Percentages with one decimal: per capability, per combination, `total`, and its `std`.

    Args:
      scores: Question id -> the score in 0..1 of every run of the judge.
      capabilities: Question id -> the skills that the question needs (`rec`, `ocr`, `know`, `gen`,
        `spat`, `math`).

    Returns:
      Combinations are sorted names joined by `_`; that of one capability begins with `only_`. `std`
      is over runs, not over questions.

    Raises:
      UserError: There are no scores, or questions have different numbers of runs.
    """
    counts = {len(runs) for runs in scores.values()}
    if len(counts) != 1 or counts == {0}:
        raise UserError(f"MM-Vet needs the same number of judge runs per question, got {counts}")
    groups = defaultdict(list)
    for name, runs in scores.items():
        needs = sorted(set(capabilities[name]))
        combination = "_".join(needs) if len(needs) > 1 else f"only_{needs[0]}"
        for group in (*needs, combination, "total"):
            groups[group].append(runs)
    means = {
        group: [100 * statistics.fmean(run) for run in zip(*rows, strict=True)]
        for group, rows in groups.items()
    }
    summary = {group: round(statistics.fmean(runs), 1) for group, runs in means.items()}
    return summary | {"std": round(statistics.pstdev(means["total"]), 1)}


def parse_mmhal(reply: str) -> int:
    """The rating in a reply; 0, the original's choice, unless it states exactly one.

    >>> parse_mmhal("No hallucination. Rating: 5"), parse_mmhal("Rating: 5 or rating: 4")
    (5, 0)
    """
    text = reply.lower()
    found = [rating for rating in range(MMHAL_MAX + 1) if f"rating: {rating}" in text]
    return found[0] if len(found) == 1 else 0


def mmhal_summary(ratings: Sequence[int], question_types: Sequence[str]) -> dict[str, float]:
    """`average_score` and `hallucination_rate` (a fraction), and the average per question type.

    Raises:
      UserError: There are no ratings, not as many types, or a rating is outside 0..6.
    """
    if not ratings or len(ratings) != len(question_types):
        raise UserError(
            f"MMHal needs a question type per rating, got {len(question_types)} for {len(ratings)}"
        )
    for rating in ratings:
        if not 0 <= rating <= MMHAL_MAX:
            raise UserError(f"an MMHal rating is 0 to {MMHAL_MAX}, got {rating}")
    groups = defaultdict(list)
    for rating, kind in zip(ratings, question_types, strict=True):
        groups[kind].append(rating)
    return {
        "average_score": statistics.fmean(ratings),
        "hallucination_rate": sum(rating < _MMHAL_GOOD for rating in ratings) / len(ratings),
        **{kind: statistics.fmean(values) for kind, values in groups.items()},
    }


def rule_mm_vet(prediction: str, answer: str) -> float:
    """Without a judge: the share of `<AND>` parts in a prediction, for the best `<OR>` part.

    >>> rule_mm_vet("I see an apple", "apple<AND>pear")
    0.5
    """
    text = prediction.lower()
    return max(
        statistics.fmean(part.strip().lower() in text for part in option.split("<AND>"))
        for option in answer.split("<OR>")
    )


def rule_mrt(prediction: str, target: str) -> str:
    """Without a judge: `Yes` if a prediction has the target as whole words, else `No`.

    >>> rule_mrt("A red car.", "red"), rule_mrt("It is covered.", "red")
    ('Yes', 'No')
    """
    found = re.search(rf"(?<!\w){re.escape(target.strip())}(?!\w)", prediction, re.IGNORECASE)
    return "Yes" if found else "No"
