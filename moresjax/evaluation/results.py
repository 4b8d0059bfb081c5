"""What an evaluation returns, and the directory that keeps it."""

import dataclasses
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np

from moresjax._version import __version__
from moresjax.analysis.attention import AttentionSummary
from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.json_files import read_log, write_json, write_log
from moresjax.core.locks import one_writer
from moresjax.core.reading import read_json
from moresjax.data.images import image_names
from moresjax.data.processor_facts import short_hash
from moresjax.evaluation.attention_log import attention_entry, write_attention
from moresjax.evaluation.examples import Example
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.predictions import FILE, decoding_of, provenance_of, row_key
from moresjax.evaluation.rows import PredictionRow, Results
from moresjax.evaluation.scoring import TaskScore
from moresjax.evaluation.statistics import clustered_stderr, image_clusters, interval
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.generation.sampling import Sampling

RESULTS = "results.json"
# Kinds of standard errors.
CLUSTERED, INDEPENDENT = "clustered by image", "i.i.d."


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Attributes:
      scores: Per task `benchmark`, `metric`, `score` (None when only a server or a judge can tell,
        or nothing could be asked), `fraction` (whether it is a share of what is right), `points`
        (whether it is no mean over questions), `stderr` (None for points), `n`, `missing`,
        `max_new_tokens`, `prompt_hash`, `details` of the benchmark's own tool, and where they apply
        `stderr_kind` and `clusters` (see `statistics.py`), `interval95` (95% confidence interval),
        `decoding` (where a benchmark draws its answers), `judge` and `errors` (questions that could
        not be asked or judged).
      predictions: One entry per answered question, in task order.
      attention: Attention statistics over all questions, when they were asked for.
      seconds: The wall time.
      submissions: File name -> content, for the servers and judges of benchmarks.
      model: The model's fingerprint; empty for saved predictions that do not name one model.
      processor: Template, image size and the like, with their `hash`.
      not_run: By benchmark of a preset why it was not run: its data are not at hand.
      attention_by_task: Attention statistics of each task with written answers about images.
    """

    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    predictions: list[dict] = dataclasses.field(default_factory=list, repr=False)
    attention: AttentionSummary | None = None
    seconds: float = 0.0
    submissions: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    model: str = ""
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decoding: str = "greedy"
    attention_by_task: Mapping[str, AttentionSummary] = dataclasses.field(default_factory=dict)

    @property
    def mean_accuracy(self) -> float | None:
        """The mean over tasks; None unless all were run and each is a share of what is right."""
        return None if self.not_run else _mean(self.scores)

    def joined(self, more: "EvaluationResult") -> "EvaluationResult":
        """This result with the tasks of another one behind its own."""
        return dataclasses.replace(
            self,
            scores=self.scores | more.scores,
            predictions=self.predictions + more.predictions,
            submissions=self.submissions | more.submissions,
            not_run={**self.not_run, **more.not_run},
        )

    def with_attention(
        self, attention: AttentionSummary | None, by_task: Mapping[str, AttentionSummary]
    ) -> "EvaluationResult":
        """This result with attention statistics over all of its questions and by task."""
        return dataclasses.replace(self, attention=attention, attention_by_task=by_task)

    def attention_entry(self, **facts: Any) -> dict[str, Any]:
        """What `attention.json` says of the model.

        Args:
          facts: Where it comes from: `model`, `adapter` and `tuning`.
        """
        assert self.attention is not None
        facts |= {"fingerprint": self.model, "template": self.processor.get("template")}
        facts["accuracy"] = self.mean_accuracy
        return attention_entry(self.attention, self.attention_by_task, self.scores, **facts)


def _mean(scores: Mapping[str, Mapping]) -> float | None:
    values = [entry["score"] for entry in scores.values() if entry.get("fraction")]
    if not scores or len(values) < len(scores) or None in values:
        return None
    return float(np.mean(values))


def score_task(
    task: BenchmarkTask,
    found: Mapping[str, str],
    *,
    errors: Mapping[str, str] | None = None,
    provenance: Mapping[str, Mapping[str, str]] | None = None,
    judge: Judge | None = None,
    sampling: Sampling | None = None,
) -> EvaluationResult:
    """Score, rows and submissions of one task.

    Args:
      task: The task.
      found: Predictions by example id; a missing one counts as wrong.
      errors: By example id, why a question could not be asked.
      provenance: By example id, the fingerprints of the model and processor that answered.
      judge: Grades answers where the benchmark wants it.
      sampling: How the evaluation chose tokens; noted where the task chose them otherwise.
    """
    own = None if sampling is None else task.sampling(sampling)
    texts = [found.get(example.id) for example in task.examples]
    score = task.scorer(task.examples, texts, judge=judge)
    if not found:  # nothing was asked: that is not the model's score
        score = TaskScore(score.metric, fraction=score.fraction)
    errors = {**(errors or {}), **score.errors}
    entry = {
        "benchmark": task.benchmark,
        "split": task.split,
        "metric": score.metric,
        "score": score.value,
        "fraction": score.fraction and score.total is None,
        **_spread(score, task.examples),
        "n": len(texts),
        "missing": texts.count(None) + len(score.errors),
        "max_new_tokens": task.max_new_tokens,
        **({"decoding": own.describe()} if own is not None and own != sampling else {}),
        "prompt_hash": short_hash("\0".join(example.prompt for example in task.examples)),
        "details": dict(score.details),
        **({"judge": dict(score.judge)} if score.judge else {}),
        **({"errors": errors} if errors else {}),
    }
    values = score.per_example or [None] * len(texts)
    rows = [
        {
            "task": task.name,
            "id": example.id,
            "prompt": example.prompt,
            "prediction": text,
            "answer": example.answer,
            "score": None if example.id in score.errors else value,
            "images": image_names(example.images),
            **example.own_limit,
            **provenance_of((provenance or {}).get(example.id, {})),
        }
        for example, text, value in zip(task.examples, texts, values, strict=True)
        if text is not None
    ]
    given = {example.id: found.get(example.id, "") for example in task.examples}
    submissions = {name: write(given) for name, write in task.submissions.items() if found}
    return EvaluationResult({task.name: entry}, rows, submissions=submissions)


def _spread(score: TaskScore, examples: Sequence[Example]) -> dict[str, Any]:
    """The entries that say how sure a score is."""
    entry: dict[str, Any] = {"points": score.total is not None, "stderr": None}
    if score.total is not None or not score.per_example:
        return entry
    clusters = image_clusters(examples)
    number = len(set(clusters))
    entry["stderr"] = error = clustered_stderr(score.per_example, clusters)
    entry["clusters"] = number
    entry["stderr_kind"] = CLUSTERED if number < len(examples) else INDEPENDENT
    if error is not None and score.value is not None:
        bounds = interval(score.value, error, number, share=score.fraction)
        entry["interval95"] = list(bounds)
    return entry


def sample_facts(sample: int | None, seed: int) -> dict[str, int]:
    """What `results.json` says about examples that were drawn; nothing where all were asked."""
    return {} if sample is None else {"sample": sample, "sample_seed": seed}


@one_writer
def write_results(
    result: EvaluationResult, out: str | Path, *, name: str = "", **facts: Any
) -> Path:
    """Writes `results.json`, `predictions.jsonl` and submission files into a directory.

    Where attention was read, `attention.json` is written too.

    Predictions that are there stay there, unless the result has the same question, or another
    model has answered the task. Scores that are there stay there if they are of the same model.

    Args:
      result: The result to write.
      out: The directory; it is made where it does not exist.
      name: The model's name in `attention.json`.
      facts: Further entries of `results.json`, such as the model's folder.

    Returns:
      The path of `results.json`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_log(out / FILE, [*_other_rows(result, out / FILE), *result.predictions])
    for name, text in result.submissions.items():
        (out / name).parent.mkdir(exist_ok=True)
        replace_file(out / name, text)
    earlier = _earlier(result, out / RESULTS)
    scores = earlier.get("scores", {}) | result.scores
    data: dict[str, Any] = {
        **facts,
        "fingerprint": result.model,
        "processor": {**earlier.get("processor", {}), **result.processor},
        # Requests of lm_eval that are drawn without a temperature here have their place in the
        # list as their seed; what a benchmark draws has its seed in the details.
        "decoding": result.decoding,
        "seed": None,
        "version": __version__,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "lm_eval": lm_eval.__version__,
        },
        "seconds": round(result.seconds, 2),
        "mean_accuracy": None if result.not_run else _mean(scores),
        "scores": scores,
    }
    if result.not_run:
        data["not_run"] = dict(result.not_run)
    if result.attention is not None:
        data["attention"] = result.attention.to_dict()
        where = {key: facts[key] for key in ("model", "adapter", "tuning") if key in facts}
        write_attention({name or "model": result.attention_entry(**where)}, out)
    elif "attention" in earlier:
        data["attention"] = earlier["attention"]
    write_json(out / RESULTS, data)
    return out / RESULTS


def _other_rows(result: EvaluationResult, path: Path) -> list[dict]:
    """Rows of a file that stay beside those of the result."""
    fresh = {row_key(row) for row in result.predictions}
    made = {fingerprints(row) for row in result.predictions} | {_fingerprints_of(result)}
    return [
        row
        for row in read_log(path, PredictionRow)
        if row_key(row) not in fresh
        and (row["task"] not in result.scores or fingerprints(row) in made)
    ]


def _earlier(result: EvaluationResult, path: Path) -> dict[str, Any]:
    """The content of `results.json`, if it is of the same model."""
    if not path.is_file():
        return {}
    try:
        data = read_json(path, Results)
    except UserError as error:
        logging.getLogger(__name__).warning("%s; it is written anew", error)
        return {}
    made = data.get("fingerprint"), data.get("processor", {}).get("hash", ""), decoding_of(data)
    return data if made == _fingerprints_of(result) else {}


def fingerprints(row: Mapping) -> tuple[str, str, str]:
    """The fingerprints of the model and the processor behind a row, and its decoding."""
    made = provenance_of(row)
    return made["model"], made["processor"], decoding_of(row)


def _fingerprints_of(result: EvaluationResult) -> tuple[str, str, str]:
    return result.model, result.processor.get("hash", ""), result.decoding
