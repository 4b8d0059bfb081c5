"""What tuning on images does to answers about text alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moresjax.evaluation.forgetting import PROMPTS
from moresjax.evaluation.run import evaluate
from moresjax.inference.model import Model
from moresjax.studies.findings import compare_with
from moresjax.studies.pipeline import ZERO_SHOT, Pipeline
from moresjax.studies.study import Outcome, Study, Table, agreement, values_table


@dataclasses.dataclass(frozen=True)
class TextScore:
    """A model's answers to questions about text.

    Attributes:
      accuracy: The mean accuracy.
      answers: The answers.
      logits: The logits of some of the questions.
    """

    accuracy: float
    answers: tuple[str, ...]
    logits: np.ndarray


def text_score(model: Model, pipeline: Pipeline, title: str) -> TextScore:
    """Asks a model the questions of the text stage."""
    options: dict[str, Any] = {"split": pipeline.split, "limit": pipeline.limit, "title": title}
    found = evaluate(model, ["digits_text"], **options)
    assert found.mean_accuracy is not None
    prompts = [row["prompt"] for row in found.predictions[:PROMPTS]]
    logits = np.concatenate([np.asarray(model.logits(prompt)[0]) for prompt in prompts])
    answers = tuple(row["prediction"] for row in found.predictions)
    return TextScore(found.mean_accuracy, answers, logits)


def text_only(
    pipeline: Pipeline, study: Study, reference: str, paper: Mapping[str, float]
) -> Outcome:
    """Accuracy on text before and after tuning, and whether answers and logits are the same.

    Args:
      pipeline: The runs.
      study: The study.
      reference: The method that the paper compares with.
      paper: The paper's number of every method.
    """
    names = [ZERO_SHOT, *(run.name for run in study.runs)]
    scores: dict[str, list[TextScore]] = {name: [] for name in names}
    for seed in pipeline.seeds:
        for name in names:
            model = pipeline.model(seed, name)
            scores[name].append(text_score(model, pipeline, f"{name}, seed {seed}, text"))
    values = {name: [score.accuracy for score in own] for name, own in scores.items()}
    rows, equal = [], {}
    for name, own in scores.items():
        pairs = list(zip(own, scores[ZERO_SHOT], strict=True))
        changed = sum(
            a != b for one, other in pairs for a, b in zip(one.answers, other.answers, strict=True)
        )
        equal[name] = all(np.array_equal(one.logits, other.logits) for one, other in pairs)
        asked = sum(len(one.answers) for one in own)
        rows.append([name, f"{changed:,d} of {asked:,d}", "yes" if equal[name] else "no"])
    head = ["method", "answers that changed", "logits bit-equal to those before tuning"]
    return Outcome(
        [
            values_table("Accuracy on text before and after", {"accuracy": values}, ZERO_SHOT),
            Table(f"Answers, and logits of {PROMPTS} questions, in all seeds", head, rows),
        ],
        [
            compare_with(ZERO_SHOT, "Accuracy on text", values),
            agreement("Accuracy on text", reference, paper, values),
        ],
        {"text_accuracy": values, "bit_equal": equal},
    )
