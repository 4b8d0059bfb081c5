"""Scores of saved predictions, without a model."""

import dataclasses
import time
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.core.json_files import read_log
from moresjax.core.locks import one_writer
from moresjax.evaluation.judges import CachedJudge, Judge
from moresjax.evaluation.predictions import FILE, decoding_of, read_predictions
from moresjax.evaluation.results import EvaluationResult, fingerprints, score_task
from moresjax.evaluation.rows import PredictionRow
from moresjax.evaluation.tasks import BenchmarkTask, draw_examples, load_tasks
from moresjax.generation.sampling import GREEDY


@one_writer
def rescore(
    task: str,
    predictions: str | Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    split: str | None = None,
    image_root: str | Path | None = None,
    judge: Judge | None = None,
    out: str | Path | None = None,
) -> EvaluationResult:
    """Scores saved predictions without a model.

    >>> import json, tempfile
    >>> from moresjax.evaluation.tasks import load_benchmark
    >>> questions = [e for task in load_benchmark("digits", limit=2) for e in task.examples]
    >>> file = Path(tempfile.mkdtemp(), "answers.json")
    >>> _ = file.write_text(json.dumps({e.id: e.answer for e in questions}))
    >>> rescore("digits", file, limit=2).mean_accuracy
    1.0

    Args:
      task: The name of a benchmark, or a file of questions as `evaluate` takes it.
      predictions: Our `predictions.jsonl`, or the benchmark's own result format; a folder with a
        file `TASK.jsonl` or `TASK.json` for each task where the benchmark has several.
      data_root: The folder of the benchmarks' official files.
      limit: The most examples per task.
      sample: How many examples of every task to draw, as `evaluate` does; the others do not count.
      seed: Seeds `sample`.
      split: The split of the data; by default the benchmark's own.
      image_root: The folder of a file's images, which tell what questions share.
      judge: Grades answers where the benchmark wants it.
      out: The directory where a judge's replies are kept while they come, and which the result is
        to be written into.

    Raises:
      UserError: The task is unknown, a file is missing or has no prediction for the benchmark's
        questions, it does not say which task they are of, or `out` holds predictions of another
        model.
    """
    start = time.monotonic()
    judge = judge if judge is None or out is None else CachedJudge(judge, out)
    loaded = load_tasks([task], data_root, limit, split, image_root)
    tasks = draw_examples(loaded, sample, seed, limit)
    files = {each.name: _file_of(Path(predictions), each, len(tasks)) for each in tasks}
    answered = []
    for each in tasks:
        file = files[each.name]
        others = [other for other in tasks if other is not each and files[other.name] == file]
        answered.append((each, *read_predictions(each, file, others)))
    made = {
        fingerprints(provenance.get(name, {}))
        for _, found, provenance in answered
        for name in found
    }
    there = () if out is None else read_log(Path(out) / FILE, PredictionRow)
    if any(fingerprints(row) not in made for row in there):
        raise UserError(f"{out} holds predictions of another model; choose another directory")
    result = EvaluationResult()
    for each, found, provenance in answered:
        # Answers of ours that no evaluation drew were chosen as the task says.
        ours = provenance and all(decoding_of(row) == "greedy" for row in provenance.values())
        sampling = GREEDY if ours else None
        result = result.joined(
            score_task(each, found, provenance=provenance, judge=judge, sampling=sampling)
        )
    if len(made) == 1:
        model, processor, decoding = made.pop()
        result = dataclasses.replace(
            result, model=model, processor={"hash": processor}, decoding=decoding
        )
    return dataclasses.replace(result, seconds=time.monotonic() - start)


def _file_of(path: Path, task: BenchmarkTask, tasks: int) -> Path:
    """The file of a task, where a benchmark of several is given a folder with one for each."""
    inside = [path / f"{task.name}{ending}" for ending in (".jsonl", ".json")]
    found = next((file for file in inside if file.is_file()), path)
    if tasks > 1 and found.is_dir():
        raise UserError(f"{path} has no {task.name}.jsonl; the folder needs one file per task")
    return found
