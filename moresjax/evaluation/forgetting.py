"""What tuning changed in answers: the same questions before and after, side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.evaluation.compare import Comparison, compare
from moresjax.evaluation.paired import OF_ONE_SEED
from moresjax.evaluation.results import EvaluationResult
from moresjax.inference.model import Model

# Prompts whose logits are compared to the bit.
PROMPTS = 8
BEFORE = "before"  # the directory of the base model's evaluation, inside of the tuned model's


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """A task before and after tuning.

    Attributes:
      task: The task.
      before: The base model's score.
      after: The tuned model's.
      n: The questions that both answered.
      changed: How many of their answers differ.
      comparison: The paired difference; None where the task has no score for each question.
    """

    task: str
    before: float | None
    after: float | None
    n: int
    changed: int
    comparison: Comparison | None


def forgetting(
    before: EvaluationResult, after: EvaluationResult, out: str | Path
) -> list[Forgetting]:
    """Every task of two evaluations.

    Args:
      before: The evaluation of the base model, which is in `out/before`.
      after: That of the tuned model on the same tasks, which is in `out`.
      out: The directory.
    """
    try:
        pairs = {c.task: c for c in compare([Path(out) / BEFORE, out])}
    except UserError:  # no task has scores of single questions
        pairs = {}
    answers = [_answers(result) for result in (before, after)]
    found = []
    for task, entry in after.scores.items():
        shared = [key for key in answers[0] if key[0] == task and key in answers[1]]
        changed = sum(answers[0][key] != answers[1][key] for key in shared)
        score = before.scores[task]["score"] if task in before.scores else None
        found.append(Forgetting(task, score, entry["score"], len(shared), changed, pairs.get(task)))
    return found


def same_logits(model: Model, base: Model, prompts: Sequence[str]) -> bool:
    """Whether two models give the same logits for prompts, to the bit."""
    return all(
        np.array_equal(np.asarray(model.logits(prompt)), np.asarray(base.logits(prompt)))
        for prompt in prompts[:PROMPTS]
    )


def forgetting_facts(rows: Sequence[Forgetting], same: bool | None) -> dict[str, Any]:
    """What `forgetting.json` says.

    Args:
      rows: The tasks.
      same: Whether logits of prompts without images are bit-equal; None where there were none.
    """
    return {"tasks": [dataclasses.asdict(row) for row in rows], "logits_bit_equal": same}


def forgetting_table(facts: Mapping[str, Any]) -> str:
    """The tasks in lines, before and after side by side.

    Args:
      facts: What `forgetting_facts` returns.
    """
    lines = [f"{'task':24s} {'before':>8s} {'after':>8s}  difference in points"]
    for row in facts["tasks"]:
        before, after = (_number(row[key]) for key in ("before", "after"))
        lines.append(f"{row['task']:24s} {before:>8s} {after:>8s}  {_difference(row)}")
    if any(row["comparison"] for row in facts["tasks"]):
        lines.append(OF_ONE_SEED)
    if facts["logits_bit_equal"] is not None:
        same = "are bit-equal to" if facts["logits_bit_equal"] else "differ from"
        lines.append(f"logits of prompts without images {same} those before tuning")
    return "\n".join(lines)


def _difference(row: Mapping[str, Any]) -> str:
    changed = f"{row['changed']:,d} of {row['n']:,d} answers changed"
    pair = row["comparison"]
    if pair is None:
        return changed
    shown = Comparison(**pair)
    bounds = "no interval"
    if shown.interval95 is not None:
        low, high = shown.interval95
        bounds = f"95% in {100 * low:+.1f} to {100 * high:+.1f}"
    word = "no difference could be shown"
    if shown.shown:
        word = "higher" if shown.difference > 0 else "lower"
    return f"{100 * shown.difference:+.1f}, {bounds}: {word}; {changed}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _answers(result: EvaluationResult) -> dict[tuple[str, str, str], str]:
    return {
        (row["task"], str(row["id"]), str(row["prompt"])): row["prediction"]
        for row in result.predictions
    }
