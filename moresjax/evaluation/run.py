"""Running benchmarks: scores, standard errors and predictions of one model."""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
from tqdm import tqdm

from moresjax import __version__
from moresjax.analysis.attention import AttentionProbe, AttentionSummary, summarize
from moresjax.data.images import image_keys
from moresjax.errors import UserError
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.predictions import (
    FILE,
    PredictionLog,
    read_log,
    read_predictions,
    write_log,
)
from moresjax.evaluation.presets import expand
from moresjax.evaluation.tasks import (
    Item,
    VisualTask,
    benchmark_names,
    load_benchmark,
)
from moresjax.evaluation.text_tasks import load_text_task, run_text_task
from moresjax.model import Model

# Nothing is fetched from a hub unless the user says so in the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Batches whose questions are prepared at a time. Answers are kept one by one, and at the end of
# every chunk the batch runs empty; ranked choices are kept chunk by chunk.
_CHUNK, _RANKED = 64, 4


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Attributes:
      scores: per task `benchmark`, `metric`, `score` (a fraction, or points where `stderr` is
        None; None when only a server or a judge can tell), `stderr`, `n`, `missing`,
        `max_new_tokens`, `prompt_hash`, `details` of the benchmark's own tool, and where they
        apply `judge` and `errors` (questions that could not be asked).
      predictions: one entry per answered question, in task order.
      attention: attention statistics over all questions, when asked for.
      seconds: wall time.
      submissions: file name -> content, for the servers and judges of benchmarks.
      model: fingerprint of the model; empty when saved predictions were scored.
    """

    scores: dict[str, dict[str, Any]]
    predictions: list[dict]
    attention: AttentionSummary | None
    seconds: float
    submissions: dict[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""

    @property
    def mean_accuracy(self) -> float | None:
        """Mean over tasks; None unless every score is a fraction."""
        scores = [entry["score"] for entry in self.scores.values() if entry["stderr"] is not None]
        return float(np.mean(scores)) if len(scores) == len(self.scores) else None


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 64,
    attention: bool = False,
    title: str = "evaluate",
    out: str | Path | None = None,
    judge: Judge | None = None,
    shots: int | None = None,
) -> EvaluationResult:
    """Runs benchmarks.

    Args:
      model: the model.
      tasks: names of benchmarks and presets, and of tasks of `lm_eval` (see `text_tasks`).
      data_root: where the benchmarks' official files are.
      limit: at most this many items per task.
      split: of the data; default: each benchmark's own.
      batch_size: rows per batch.
      attention: also read the attention statistics of every generated token.
      title: of the progress bar.
      out: directory where predictions are kept while they are made: a killed evaluation continues.
      judge: grades answers where a benchmark wants it.
      shots: examples before the questions of `lm_eval`'s tasks; default: as published.

    Raises:
      UserError: for an unknown task, a missing file, a limit or batch size below 1, `attention`
        with `out`, or a task none of whose questions could be asked.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if attention and out is not None:
        raise UserError("attention statistics cannot be continued; evaluate without out")
    names = expand(tasks)
    texts = {n: load_text_task(n, data_root) for n in names if n not in benchmark_names()}
    if texts and (attention or split):
        name = next(iter(texts))
        raise UserError(f"{name} is a task of lm_eval: it has its own splits, and no images")
    loaded = _load([name for name in names if name not in texts], data_root, limit, split)
    start = time.monotonic()
    probe = AttentionProbe()
    collected = []

    log = PredictionLog(out, model.fingerprint)

    replies: dict[tuple[str, str], str] = {}

    def done(request, row, completion, text):
        log.add(request.task_name, request.doc, text)
        replies[request.task_name, request.doc.id] = text
        bar.update()
        if attention:
            stats, tokens = completion.stats[probe.name], len(completion.tokens)
            collected.append((stats["mass"], stats["score"], tokens, "pixels" in row))

    probes = (probe,) if attention else ()
    lm = MoresjaxLM(model, batch_size=batch_size, probes=probes, on_done=done)
    answered = []
    with tqdm(total=sum(len(t.items) for _, t in loaded), desc=title, disable=None) as bar:
        for benchmark, task in loaded:
            known = log.known(task)
            bar.update(len(known))
            pending = _in_order(item for item in task.items if item.id not in known)
            errors = {}
            size = batch_size * (_RANKED if task.ranks else _CHUNK)
            for at in range(0, len(pending), size):
                chunk = pending[at : at + size]
                found, bad = _answer(lm, task, chunk, replies)
                for item in chunk if task.ranks else ():
                    if item.id in found:
                        log.add(task.name, item, found[item.id])
                known, errors = known | found, errors | bad
                bar.update(len(chunk) if task.ranks else len(bad))
            if not known:
                raise UserError(
                    f"no question of task {task.name} could be asked: {next(iter(errors.values()))}"
                )
            answered.append((benchmark, task, known, errors))
    summary = None
    if collected:
        mass, score, tokens, has_image = zip(*collected, strict=True)
        summary = summarize(
            np.stack(mass, 1), np.stack(score, 1), np.asarray(tokens), np.asarray(has_image)
        )
    result = _score(answered, judge, log.model)
    lm = MoresjaxLM(model, batch_size=batch_size)
    for name, chosen in texts.items():
        cache = None if out is None else Path(out) / f"replies-{log.model}"
        options = {"limit": limit, "shots": shots, "cache": cache}
        scores, rows = run_text_task(lm, name, chosen, **options)
        result.scores.update(scores)
        result.predictions.extend(row | {"model": log.model} for row in rows)
    return dataclasses.replace(result, attention=summary, seconds=time.monotonic() - start)


def rescore(
    task: str,
    predictions: str | Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    judge: Judge | None = None,
) -> EvaluationResult:
    """Scores saved predictions without a model.

    Args:
      task: name of a benchmark.
      predictions: our `predictions.jsonl`, or the benchmark's own result format.
      data_root, limit, split, judge: as in `evaluate`.

    Raises:
      UserError: as `evaluate`; or when the file has no prediction for the benchmark's questions.
    """
    start = time.monotonic()
    answered = [
        (benchmark, loaded, read_predictions(loaded, _one_file(Path(predictions), loaded)), {})
        for benchmark, loaded in _load([task], data_root, limit, split)
    ]
    return dataclasses.replace(_score(answered, judge, ""), seconds=time.monotonic() - start)


def _one_file(path: Path, task: VisualTask) -> Path:
    """The file of a task, where a benchmark of several is given a folder with one for each."""
    inside = [path / f"{task.name}{ending}" for ending in (".jsonl", ".json")]
    return next((file for file in inside if file.is_file()), path)


def _load(tasks, data_root, limit, split) -> list[tuple[str, VisualTask]]:
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return [
        (name, task)
        for name in expand(tasks)
        for task in load_benchmark(name, data_root=data_root, limit=limit, split=split)
    ]


def _in_order(items: Iterable[Item]) -> list[Item]:
    """Questions such that neighbours are about the same images, and otherwise of about the same
    length."""
    groups: dict[tuple, list[Item]] = {}
    for item in sorted(items, key=lambda item: len(item.prompt)):
        groups.setdefault(image_keys(item.images), []).append(item)
    return [item for group in groups.values() for item in group]


def _answer(
    lm: MoresjaxLM, task: VisualTask, items: Sequence[Item], replies: Mapping[tuple[str, str], str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Predictions by id, and what is wrong with the questions that cannot be asked.

    `replies` are those that were generated, by task and id, also before something went wrong.
    """
    try:
        return _ask(lm, task, items), {}
    except UserError:
        found = {
            item.id: replies[task.name, item.id]
            for item in items
            if (task.name, item.id) in replies
        }
        left = [item for item in items if item.id not in found]
        errors = {item.id: error for item in left if (error := _problem(lm.model, task, item))}
        if not errors:
            raise
        rest = [item for item in left if item.id not in errors]
        return found | (_ask(lm, task, rest) if rest else {}), errors


def _problem(model: Model, task: VisualTask, item: Item) -> str:
    try:
        row = model.prompt(item.prompt, item.images, item.id)
        if not task.ranks:
            model.check_context(row, task.max_new_tokens)
        for choice in item.choices if task.ranks else ():
            pair = model.with_answer(row, item.prompt, item.images, choice)
            model.check_answer(*pair)
    except UserError as error:
        return str(error)
    return ""


def _ask(lm: MoresjaxLM, task: VisualTask, items: Sequence[Item]) -> dict[str, str]:
    requests = [task.construct_requests(item, None, index=i) for i, item in enumerate(items)]
    method = lm.loglikelihood if task.ranks else lm.generate_until
    replies = iter(method([r for own in requests for r in own], disable_tqdm=True))
    return {
        item.id: task.prediction(item, [next(replies) for _ in own])
        for item, own in zip(items, requests, strict=True)
    }


def _score(answered: Sequence[tuple], judge: Judge | None, model: str) -> EvaluationResult:
    scores, rows, submissions = {}, [], {}
    for benchmark, task, found, errors in answered:
        texts = [found.get(item.id) for item in task.items]
        score = task.score(task.items, texts, judge)
        prompts = "\0".join(item.prompt for item in task.items)
        scores[task.name] = {
            "benchmark": benchmark,
            "metric": score.metric,
            "score": score.value,
            "stderr": score.stderr,
            "n": len(texts),
            "missing": texts.count(None),
            "max_new_tokens": task.max_new_tokens,
            "prompt_hash": hashlib.sha256(prompts.encode()).hexdigest()[:12],
            "details": dict(score.details),
            **({"judge": dict(score.judge)} if score.judge else {}),
            **({"errors": errors} if errors else {}),
        }
        values = score.items or [None] * len(texts)
        rows += [
            {
                "task": task.name,
                "id": item.id,
                "prompt": item.prompt,
                "prediction": text,
                "answer": item.answer,
                "score": value,
                "model": model,
            }
            for item, text, value in zip(task.items, texts, values, strict=True)
            if text is not None
        ]
        given = {item.id: found.get(item.id, "") for item in task.items}
        submissions |= {name: write(given) for name, write in task.submissions.items()}
    return EvaluationResult(scores, rows, None, 0.0, submissions, model)


def write_results(result: EvaluationResult, out: str | Path, **facts) -> Path:
    """Writes `results.json`, `predictions.jsonl` and submission files into a directory.

    Predictions of other tasks that are there stay there.

    Returns:
      The path of `results.json`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    others = [row for row in read_log(out / FILE) if row["task"] not in result.scores]
    write_log(out / FILE, [*others, *result.predictions])
    for name, text in result.submissions.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    data: dict[str, Mapping | Any] = {
        **facts,
        "fingerprint": result.model,
        "decoding": "greedy",
        "seed": None,  # nothing is drawn; benchmarks that draw name their seed in the details
        "version": __version__,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "lm_eval": lm_eval.__version__,
        },
        "seconds": round(result.seconds, 2),
        "mean_accuracy": result.mean_accuracy,
        "scores": result.scores,
    }
    if result.attention is not None:
        data["attention"] = result.attention.to_dict()
    (out / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    return out / "results.json"
