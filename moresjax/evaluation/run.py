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

from moresjax._version import __version__
from moresjax.analysis.attention import AttentionProbe, AttentionSummary, summarize
from moresjax.core.errors import UserError, choice_error
from moresjax.data.images import image_keys
from moresjax.evaluation.files import read_log, replace_file, write_log
from moresjax.evaluation.judges import CachedJudge, Judge
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.lm_eval_tasks import failed_task, load_text_task, run_text_task
from moresjax.evaluation.predictions import (
    FILE,
    PredictionLog,
    mark_of,
    processor_facts,
    read_predictions,
    row_key,
)
from moresjax.evaluation.presets import expand
from moresjax.evaluation.scoring import Score
from moresjax.evaluation.tasks import (
    Item,
    VisualTask,
    benchmark_names,
    load_benchmark,
)
from moresjax.inference.model import Model

# Nothing is fetched from a hub unless the user says so in the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Batches whose questions are prepared at a time. Answers are kept one by one, and at the end of
# every chunk the batch runs empty; ranked choices are kept chunk by chunk.
_CHUNK, _RANKED = 64, 4
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Attributes:
      scores: per task `benchmark`, `metric`, `score` (None when only a server or a judge can tell,
        or nothing could be asked), `fraction` (whether it is a share of what is right), `stderr`
        (None for points), `n`, `missing`, `max_new_tokens`, `prompt_hash`, `details` of the
        benchmark's own tool, and where they apply `judge` and `errors` (questions that could not
        be asked or judged).
      predictions: one entry per answered question, in task order.
      attention: attention statistics over all questions, when asked for.
      seconds: wall time.
      submissions: file name -> content, for the servers and judges of benchmarks.
      model: fingerprint of the model; empty for saved predictions that do not name one model.
      processor: template, image size and the like, with their `hash`.
    """

    scores: dict[str, dict[str, Any]]
    predictions: list[dict]
    attention: AttentionSummary | None
    seconds: float
    submissions: dict[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mean_accuracy(self) -> float | None:
        """Mean over tasks; None unless every score is a share of what is right."""
        return _mean(self.scores)


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
      split: of the data, for all tasks or as `TASK=SPLIT,TASK=SPLIT` for some; default: each
        benchmark's own.
      batch_size: rows per batch.
      attention: also read the attention statistics of every generated token.
      title: of the progress bar.
      out: directory where predictions and a judge's replies are kept while they are made, and
        scores after every task: a killed evaluation continues.
      judge: grades answers where a benchmark wants it.
      shots: examples before the questions of `lm_eval`'s tasks; default: as published.

    Raises:
      UserError: for an unknown task, a missing file, a limit or batch size below 1, `attention`
        with `out`, or when no question of any task could be asked.
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

    facts = processor_facts(model.processor)
    log = PredictionLog(out, {"model": model.fingerprint, "processor": facts["hash"]})
    judge = judge if judge is None or out is None else CachedJudge(judge, out)
    result = EvaluationResult({}, [], None, 0.0, model=log.mark["model"], processor=facts)

    def finish(found: EvaluationResult) -> EvaluationResult:
        whole = dataclasses.replace(_joined(result, found), seconds=time.monotonic() - start)
        if out is not None:
            write_results(whole, out, split=split)
        return whole

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
            marks = dict.fromkeys(known, log.mark)
            result = finish(_score(benchmark, task, known, errors, marks, judge))
    summary = None
    if collected:
        mass, score, tokens, has_image = zip(*collected, strict=True)
        summary = summarize(
            np.stack(mass, 1), np.stack(score, 1), np.asarray(tokens), np.asarray(has_image)
        )
    lm = MoresjaxLM(model, batch_size=batch_size)
    cache = None if out is None else Path(out) / f"replies-{'-'.join(log.mark.values())}"
    for name, chosen in texts.items():
        options = {"limit": limit, "shots": shots, "cache": cache}
        try:
            scores, rows = run_text_task(lm, name, chosen, **options)
        except Exception as error:  # of the library: what was scored before stays
            logging.getLogger(__name__).warning(f"{name} failed", exc_info=True)
            scores, rows = failed_task(name, error), []
        rows = [row | log.mark for row in rows]
        result = finish(EvaluationResult(scores, rows, None, 0.0))
    failed = {name: entry["errors"] for name, entry in result.scores.items() if "errors" in entry}
    if failed and not result.predictions:
        name, errors = next(iter(failed.items()))
        reason = next(iter(errors.values()))
        raise UserError(f"no question of task {name} could be asked: {reason}")
    return dataclasses.replace(result, attention=summary, seconds=time.monotonic() - start)


def rescore(
    task: str,
    predictions: str | Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    judge: Judge | None = None,
    out: str | Path | None = None,
) -> EvaluationResult:
    """Scores saved predictions without a model.

    Args:
      task: name of a benchmark.
      predictions: our `predictions.jsonl`, or the benchmark's own result format; a folder with a
        file `TASK.jsonl` or `TASK.json` for each task where the benchmark has several.
      data_root, limit, split, judge: as in `evaluate`.
      out: directory where a judge's replies are kept while they come, and which the result is to
        be written into.

    Raises:
      UserError: as `evaluate`; when the file has no prediction for the benchmark's questions, or
        does not say which task they are of; or when `out` holds predictions of another model.
    """
    start = time.monotonic()
    judge = judge if judge is None or out is None else CachedJudge(judge, out)
    loaded = _load([task], data_root, limit, split)
    files = {each.name: _one_file(Path(predictions), each, len(loaded)) for _, each in loaded}
    answered = []
    for benchmark, each in loaded:
        file = files[each.name]
        others = [t for _, t in loaded if t is not each and files[t.name] == file]
        answered.append((benchmark, each, *read_predictions(each, file, others)))
    made = {_pair(marks.get(name, {})) for _, _, found, marks in answered for name in found}
    if out is not None and any(_pair(row) not in made for row in read_log(Path(out) / FILE)):
        raise UserError(f"{out} holds predictions of another model; choose another directory")
    result = EvaluationResult({}, [], None, 0.0)
    for benchmark, each, found, marks in answered:
        result = _joined(result, _score(benchmark, each, found, {}, marks, judge))
    if len(made) == 1:
        model, processor = made.pop()
        result = dataclasses.replace(result, model=model, processor={"hash": processor})
    return dataclasses.replace(result, seconds=time.monotonic() - start)


def _one_file(path: Path, task: VisualTask, tasks: int) -> Path:
    """The file of a task, where a benchmark of several is given a folder with one for each."""
    inside = [path / f"{task.name}{ending}" for ending in (".jsonl", ".json")]
    found = next((file for file in inside if file.is_file()), path)
    if tasks > 1 and found.is_dir():
        raise UserError(f"{path} has no {task.name}.jsonl; the folder needs one file per task")
    return found


def _joined(result: EvaluationResult, more: EvaluationResult) -> EvaluationResult:
    """The result with further tasks."""
    return dataclasses.replace(
        result,
        scores=result.scores | more.scores,
        predictions=result.predictions + more.predictions,
        submissions=result.submissions | more.submissions,
    )


def _mean(scores: Mapping[str, Mapping]) -> float | None:
    values = [entry["score"] if entry.get("fraction") else None for entry in scores.values()]
    return float(np.mean(values)) if values and None not in values else None


def _load(tasks, data_root, limit, split) -> list[tuple[str, VisualTask]]:
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = expand(tasks)
    splits = _splits(split, names)
    return [
        (name, task)
        for name in names
        for task in load_benchmark(name, data_root=data_root, limit=limit, split=splits.get(name))
    ]


def _splits(split: str | None, names: Sequence[str]) -> dict[str, str]:
    """The split of every task that has not its own: `SPLIT`, or `TASK=SPLIT,TASK=SPLIT`."""
    if split is None or "=" not in split:
        return {} if split is None else dict.fromkeys(names, split)
    splits = dict(pair.partition("=")[::2] for pair in split.split(","))
    for name in splits:
        if name not in names:
            raise choice_error("task of a split", name, names)
    return splits


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
            model.service.check_context(row, task.max_new_tokens)
        for choice in item.choices if task.ranks else ():
            pair = model.prompts.with_answer(row, item.prompt, item.images, choice)
            model.service.check_answer(*pair)
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


def _score(
    benchmark: str,
    task: VisualTask,
    found: Mapping[str, str],
    errors: Mapping[str, str],
    marks: Mapping[str, Mapping[str, str]],
    judge: Judge | None,
) -> EvaluationResult:
    """Score, rows and submission of one task; `marks` tell who answered."""
    texts = [found.get(item.id) for item in task.items]
    score = task.score(task.items, texts, judge)
    if not found:  # nothing was asked: that is not the model's score
        score = Score(score.metric, fraction=score.fraction)
    prompts = "\0".join(item.prompt for item in task.items)
    errors = {**errors, **score.errors}
    entry = {
        "benchmark": benchmark,
        "metric": score.metric,
        "score": score.value,
        "fraction": score.fraction and score.total is None,
        "stderr": score.stderr,
        "n": len(texts),
        "missing": texts.count(None) + len(score.errors),
        "max_new_tokens": task.max_new_tokens,
        "prompt_hash": hashlib.sha256(prompts.encode()).hexdigest()[:12],
        "details": dict(score.details),
        **({"judge": dict(score.judge)} if score.judge else {}),
        **({"errors": errors} if errors else {}),
    }
    values = score.items or [None] * len(texts)
    rows = [
        {
            "task": task.name,
            "id": item.id,
            "prompt": item.prompt,
            "prediction": text,
            "answer": item.answer,
            "score": None if item.id in score.errors else value,
            **marks.get(item.id, mark_of({})),
        }
        for item, text, value in zip(task.items, texts, values, strict=True)
        if text is not None
    ]
    given = {item.id: found.get(item.id, "") for item in task.items} if found else {}
    submissions = {name: write(given) for name, write in task.submissions.items() if found}
    return EvaluationResult({task.name: entry}, rows, None, 0.0, submissions)


def write_results(result: EvaluationResult, out: str | Path, **facts) -> Path:
    """Writes `results.json`, `predictions.jsonl` and submission files into a directory.

    Predictions that are there stay there, unless the result has the same question, or another
    model has answered the task. Scores that are there stay there if they are of the same model.

    Returns:
      The path of `results.json`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_log(out / FILE, [*_others(result, out / FILE), *result.predictions])
    for name, text in result.submissions.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    earlier = _earlier(result, out / RESULTS)
    scores = earlier.get("scores", {}) | result.scores
    data: dict[str, Mapping | Any] = {
        **facts,
        "fingerprint": result.model,
        "processor": {**earlier.get("processor", {}), **result.processor},
        "decoding": "greedy",
        # What a benchmark draws has its seed in the details; requests of lm_eval that are drawn
        # have their place in the list.
        "seed": None,
        "version": __version__,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "lm_eval": lm_eval.__version__,
        },
        "seconds": round(result.seconds, 2),
        "mean_accuracy": _mean(scores),
        "scores": scores,
    }
    if result.attention is not None:
        data["attention"] = result.attention.to_dict()
    replace_file(out / RESULTS, json.dumps(data, indent=2) + "\n")
    return out / RESULTS


def _others(result: EvaluationResult, path: Path) -> list[dict]:
    """Rows of a file that stay beside those of the result."""
    fresh = {row_key(row) for row in result.predictions}
    made = {_pair(row) for row in result.predictions} | {_of(result)}
    return [
        row
        for row in read_log(path)
        if row_key(row) not in fresh and (row["task"] not in result.scores or _pair(row) in made)
    ]


def _earlier(result: EvaluationResult, path: Path) -> dict:
    """The results that a file has of the same model."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    made = data.get("fingerprint"), data.get("processor", {}).get("hash", "")
    return data if made == _of(result) else {}


def _pair(row: Mapping) -> tuple[str, str]:
    """The fingerprints of the model and the processor that made a row."""
    mark = mark_of(row)
    return mark["model"], mark["processor"]


def _of(result: EvaluationResult) -> tuple[str, str]:
    return result.model, result.processor.get("hash", "")
