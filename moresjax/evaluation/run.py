"""Running benchmarks: scores, standard errors and predictions of one model."""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from moresjax import __version__
from moresjax.analysis.attention import AttentionProbe, AttentionSummary, summarize
from moresjax.errors import UserError
from moresjax.model import Model

# Nothing is fetched from a hub unless the user says so in the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Attributes:
      scores: per task `accuracy`, `stderr` and `n`.
      predictions: one entry per question, in task order.
      attention: attention statistics over all questions, when asked for.
      seconds: wall time.
    """

    scores: dict[str, dict[str, float]]
    predictions: list[dict]
    attention: AttentionSummary | None
    seconds: float

    @property
    def mean_accuracy(self) -> float:
        """Mean over tasks."""
        return float(np.mean([score["accuracy"] for score in self.scores.values()]))


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 64,
    attention: bool = False,
    title: str = "evaluate",
) -> EvaluationResult:
    """Runs benchmarks through `lm_eval`.

    Args:
      model: the model.
      tasks: benchmark names.
      data_root: where the benchmarks' official files are.
      limit: at most this many items per task.
      split: of the data.
      batch_size: rows per batch.
      attention: also read the attention statistics of every generated token.
      title: of the progress bar.

    Raises:
      UserError: for an unknown task, or a limit below 1.
    """
    from lm_eval.evaluator import evaluate as run_tasks

    # Benchmarks register themselves on import.
    from moresjax.evaluation import benchmarks  # noqa: F401
    from moresjax.evaluation.lm import MoresjaxLM
    from moresjax.evaluation.tasks import load_benchmark

    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = [
        task
        for name in tasks
        for task in load_benchmark(name, data_root=data_root, limit=limit, split=split)
    ]
    start = time.monotonic()
    probe = AttentionProbe()
    collected = []

    def collect(numbers, rows, generation):
        stats = jax.tree.map(np.asarray, generation.stats[probe.name])
        has_image = np.asarray([len(row.get("pixels", ())) > 0 for row in rows])
        collected.append((stats["mass"], stats["score"], np.asarray(generation.length), has_image))

    lm = MoresjaxLM(
        model,
        batch_size=batch_size,
        probes=(probe,) if attention else (),
        on_batch=collect if attention else None,
        title=title,
    )
    by_name = {task.config.task: task for task in loaded}
    run_tasks(
        lm=lm, task_dict={"tasks": by_name, "groups": {}}, bootstrap_iters=0, log_samples=False
    )
    scores, predictions = {}, []
    for name, task in by_name.items():
        values = []
        for instance in task.instances:
            text = instance.resps[0]
            value = task.process_results(instance.doc, [text])["accuracy"]
            values.append(value)
            predictions.append(
                {
                    "task": name,
                    "id": instance.doc.id,
                    "prompt": instance.doc.prompt,
                    "prediction": text,
                    "answer": instance.doc.answer,
                    "accuracy": value,
                }
            )
        n = len(values)
        mean = float(np.mean(values))
        scores[name] = {
            "accuracy": mean,
            "stderr": math.sqrt(mean * (1 - mean) / max(n - 1, 1)),
            "n": n,
        }
    summary = None
    if collected:
        mass, score, tokens, has_image = zip(*collected, strict=True)
        summary = summarize(
            np.concatenate(mass, 1),
            np.concatenate(score, 1),
            np.concatenate(tokens),
            np.concatenate(has_image),
        )
    return EvaluationResult(scores, predictions, summary, time.monotonic() - start)


def write_results(result: EvaluationResult, out: str | Path, **facts) -> Path:
    """Writes `results.json` and `predictions.jsonl` into a directory; returns the former's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in result.predictions:
            file.write(json.dumps(prediction) + "\n")
    data = {
        **facts,
        "version": __version__,
        "seconds": round(result.seconds, 2),
        "mean_accuracy": result.mean_accuracy,
        "scores": result.scores,
    }
    if result.attention is not None:
        data["attention"] = result.attention.to_dict()
    (out / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    return out / "results.json"
