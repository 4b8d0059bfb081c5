"""`predictions.jsonl`: what a model answered, one row per question, written while it answers.

A row has the task, the question's id and prompt, the prediction, and the fingerprint of the model;
a finished evaluation adds the true answer and the score.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moresjax.errors import UserError
from moresjax.evaluation.items import Item
from moresjax.evaluation.tasks import VisualTask

FILE = "predictions.jsonl"


def read_log(path: Path) -> list[dict]:
    """Rows of a file; a last line that a killed process left unfinished is dropped.

    Raises:
      UserError: for another damaged line.
    """
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not JSON: {error}") from None
    return rows


def write_log(path: Path, rows: Iterable[Mapping]) -> None:
    """Replaces the file as a whole."""
    fresh = path.with_suffix(".tmp")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


class PredictionLog:
    """Predictions of one model that survive a killed process.

    Args:
      out: directory; without one nothing is kept.
      model: the model's fingerprint.

    Raises:
      UserError: when the directory holds predictions of another model.
    """

    def __init__(self, out: str | Path | None, model: str):
        self._path, self.model = None if out is None else Path(out) / FILE, model
        self._known: dict[tuple[str, str], dict] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_log(self._path)
        for row in rows:
            if row.get("model") != model:
                raise UserError(
                    f"{self._path} holds predictions of another model ({row.get('model')}, not "
                    f"{model}); choose another directory"
                )
            self._known[row["task"], row["id"]] = row
        if rows:
            write_log(self._path, rows)

    def known(self, task: VisualTask) -> dict[str, str]:
        """Predictions by id of the task's questions that were asked in the same words."""
        rows = {item.id: self._known.get((task.name, item.id)) for item in task.items}
        prompts = {item.id: item.prompt for item in task.items}
        return {
            name: row["prediction"]
            for name, row in rows.items()
            if row is not None and row["prompt"] == prompts[name]
        }

    def add(self, task: str, item: Item, prediction: str) -> None:
        """Appends the prediction for an item of the task of that name."""
        if self._path is None:
            return
        row = {"task": task, "id": item.id, "prompt": item.prompt}
        row |= {"prediction": prediction, "model": self.model}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_predictions(task: VisualTask, path: Path) -> dict[str, str]:
    """Predictions by id from a saved file: ours, or in the benchmark's own result format.

    Raises:
      UserError: when there is no file, it has neither format, or it is about other questions.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".jsonl" and path.is_file():
        rows = read_log(path)
        if rows and {"task", "id", "prediction"} <= set(rows[0]):
            found = {row["id"]: row["prediction"] for row in rows if row["task"] == task.name}
            return _of_task(task, found, path)
    found = task.read(path)
    if not isinstance(found, Mapping):
        if len(found) != len(task.items):
            raise UserError(
                f"{path} has no ids and {len(found)} predictions for the {len(task.items)} "
                f"questions of {task.name}"
            )
        found = dict(zip([item.id for item in task.items], found, strict=True))
    return _of_task(task, found, path)


def _of_task(task: VisualTask, found: Mapping[str, str], path: Path) -> dict[str, str]:
    kept = {item.id: found[item.id] for item in task.items if item.id in found}
    if not kept:
        raise UserError(f"{path} has no prediction for any question of {task.name}")
    return kept
