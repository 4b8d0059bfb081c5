"""`predictions.jsonl`: what a model answered, one row per question, written while it answers.

A row has the task, the question's id and prompt, the prediction, and its provenance: the
fingerprints of the model, of its processor and of its exact weights. A finished evaluation adds the
true answer, the score, and names that tell its images apart. The names of the other fields are
those of version 0.1, whose files continue; they have neither exact weights nor images.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.core.json_files import append_log, read_log, write_log
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import SavedPredictions, Unlabelled
from moresjax.evaluation.rows import PredictionRow
from moresjax.evaluation.tasks import BenchmarkTask

FILE = "predictions.jsonl"


class PredictionLog:
    """Predictions of one model that survive a killed process.

    Args:
      out: The directory of `predictions.jsonl`; without one nothing is kept.
      provenance: `model`, `processor` and `weights`, the fingerprints that every row carries, and
        `decoding` where answers are drawn.

    Raises:
      UserError: The directory holds predictions of another model.
    """

    def __init__(self, out: str | Path | None, provenance: Mapping[str, str]) -> None:
        self._path, self.provenance = None if out is None else Path(out) / FILE, dict(provenance)
        self._known: dict[tuple[str, str, str], dict] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_log(self._path, PredictionRow)
        for row in rows:
            if row.get("model") != provenance["model"]:
                raise UserError(
                    f"{self._path} holds predictions of another model ({row.get('model')}, not "
                    f"{provenance['model']}); choose another directory"
                )
            if row.get("processor") != provenance["processor"]:
                raise UserError(
                    f"{self._path} holds predictions of this model with another template, "
                    "tokenizer or image size; choose another directory"
                )
            if row.get("weights", provenance["weights"]) != provenance["weights"]:
                raise UserError(
                    f"{self._path} holds predictions of this model with other weights, such as "
                    "those of another step or precision; choose another directory"
                )
            if (made := decoding_of(row)) != (wanted := decoding_of(provenance)):
                raise UserError(
                    f"{self._path} holds predictions of this model by other decoding ({made}, not "
                    f"{wanted}); choose another directory"
                )
            self._known[row_key(row)] = row
        if rows:
            write_log(self._path, rows)

    def known(self, task: BenchmarkTask) -> dict[str, str]:
        """Predictions by id for the task's questions that were asked in the same way."""
        return {name: row["prediction"] for name, row in self._rows(task).items()}

    def made(self, task: BenchmarkTask, found: Iterable[str]) -> dict[str, dict[str, str]]:
        """The provenance of predictions, by id: what is known of earlier ones is kept as it is."""
        earlier = {
            name: {key: row[key] for key in self.provenance if key in row}
            for name, row in self._rows(task).items()
        }
        return {name: earlier.get(name, self.provenance) for name in found}

    def _rows(self, task: BenchmarkTask) -> dict[str, dict]:
        rows = {}
        for example in task.examples:
            row = self._known.get((task.name, example.id, example.prompt))
            # Of a task's own limit, which is part of the code, rows say nothing.
            if row is not None and row.get("max_new_tokens") == example.max_new_tokens:
                rows[example.id] = row
        return rows

    def add(self, task: str, example: Example, prediction: str) -> None:
        """Appends the prediction for an example of the task of that name."""
        if self._path is None:
            return
        row = {"task": task, "id": example.id, "prompt": example.prompt}
        row |= {"prediction": prediction, **example.own_limit, **self.provenance}
        append_log(self._path, row)


def row_key(row: Mapping) -> tuple[str, str, str]:
    """What a row answers. Splits may have the same ids, so the prompt belongs to it."""
    return row["task"], row["id"], row.get("prompt", "")


def decoding_of(row: Mapping) -> str:
    """How the tokens behind a row, or behind results, were chosen."""
    return row.get("decoding", "greedy")


def provenance_of(row: Mapping) -> dict[str, str]:
    """The fingerprints behind a row; those of model and processor are empty where not known."""
    exact = {name: row[name] for name in ("weights", "decoding") if name in row}
    return {name: row.get(name, "") for name in ("model", "processor")} | exact


def read_predictions(
    task: BenchmarkTask, path: Path, others: Sequence[BenchmarkTask] = ()
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Predictions from a saved file: our own, or in the benchmark's own result format.

    Args:
      task: The task whose questions were answered.
      path: The saved file.
      others: Further tasks that are to be read from the same file.

    Returns:
      Predictions by id, and by id the provenance of each where the file says it.

    Raises:
      UserError: There is no file, it has neither format, it is about other questions, or it does
        not tell the tasks apart.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".jsonl" and path.is_file():
        rows = read_log(path)
        if rows and {"task", "id", "prediction"} <= set(rows[0]):
            rows = read_log(path, PredictionRow)
            own = {row["id"]: row for row in rows if row["task"] == task.name}
            asked = {(task.name, example.id, example.prompt) for example in task.examples}
            own |= {row["id"]: row for row in rows if "prompt" in row and row_key(row) in asked}
            texts = {name: row["prediction"] for name, row in own.items()}
            provenance = {name: provenance_of(row) for name, row in own.items()}
            return _of_task(task, texts, path), provenance
    found = task.read(path)
    if _mixes_tasks(found, task, others):
        names = ", ".join(f"{each.name}.jsonl" for each in (task, *others))
        raise UserError(
            f"{path} does not say which of {len(others) + 1} tasks its answers belong to; give a "
            f"folder with one file for each, named {names}"
        )
    by_id = found if isinstance(found, Mapping) else _by_order(task, found, path)
    return _of_task(task, by_id, path), {}


def _mixes_tasks(
    found: SavedPredictions, task: BenchmarkTask, others: Sequence[BenchmarkTask]
) -> bool:
    """Whether predictions could belong to several tasks."""
    if not isinstance(found, Mapping):
        return bool(others)
    ids = {example.id for example in task.examples}
    return any(not ids.isdisjoint(e.id for e in other.examples) for other in others)


def _by_order(task: BenchmarkTask, found: Sequence[Unlabelled], path: Path) -> dict[str, str]:
    """By id, if there is one per question, and the questions beside them are the task's."""
    if len(found) != len(task.examples):
        raise UserError(
            f"{path} has no ids and {len(found)} predictions for the {len(task.examples)} "
            f"questions of {task.name}"
        )
    for number, (row, example) in enumerate(zip(found, task.examples, strict=True)):
        if _words(row.question) not in _words(example.prompt):
            raise UserError(
                f"row {number} of {path} answers {row.question!r}, but that question of "
                f"{task.name} is {example.prompt!r}"
            )
    return {example.id: row.text for row, example in zip(found, task.examples, strict=True)}


def _words(text: str) -> str:
    return " ".join(text.replace(IMAGE_MARK, "").casefold().split())


def _of_task(task: BenchmarkTask, found: Mapping[str, str], path: Path) -> dict[str, str]:
    kept = {example.id: found[example.id] for example in task.examples if example.id in found}
    if not kept:
        raise UserError(f"{path} has no prediction for any question of {task.name}")
    return kept
