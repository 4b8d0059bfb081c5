"""`predictions.jsonl`: what a model answered, one row per question, written while it answers.

A row has the task, the question's id and prompt, the prediction, and what the answer depends on:
the fingerprints of the model and of its processor. A finished evaluation adds the true answer and
the score.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK
from moresjax.data.templates import OWN, TEMPLATES
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import Unlabelled, read_log, write_log
from moresjax.evaluation.tasks import VisualTask

FILE = "predictions.jsonl"


def processor_facts(processor: Processor | None) -> dict[str, Any]:
    """Template, image size and the like, with a hash that tells them and the vocabulary apart."""
    if processor is None:
        return {"hash": ""}
    image, vocabulary = processor.image, sorted(processor.tokenizer.get_vocab().items())
    # What transformers saved does not always have a text that stays the same.
    saved = getattr(getattr(image, "reference", None), "to_dict", dict)()
    pixels = image and (image.mean, image.std, sorted(saved.items()))
    names = [name for name, template in TEMPLATES.items() if template == processor.template]
    facts = {
        "template": "/".join(names) or OWN,
        "vocabulary": _hash(json.dumps(vocabulary)),
        "visual_tokens": processor.visual_tokens,
        "image_size": image and image.size,
        "image_aspect": image and image.aspect,
    }
    return facts | {"hash": _hash(repr((facts, processor.template, processor.eos_ids, pixels)))}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class PredictionLog:
    """Predictions of one model that survive a killed process.

    Args:
      out: directory; without one nothing is kept.
      mark: what every row says of the model: `model` and `processor`, its fingerprints.

    Raises:
      UserError: when the directory holds predictions of another model.
    """

    def __init__(self, out: str | Path | None, mark: Mapping[str, str]):
        self._path, self.mark = None if out is None else Path(out) / FILE, mark
        self._known: dict[tuple[str, str, str], dict] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_log(self._path)
        for row in rows:
            if row.get("model") != mark["model"]:
                raise UserError(
                    f"{self._path} holds predictions of another model ({row.get('model')}, not "
                    f"{mark['model']}); choose another directory"
                )
            if row.get("processor") != mark["processor"]:
                raise UserError(
                    f"{self._path} holds predictions of this model with another template, "
                    "tokenizer or image size; choose another directory"
                )
            self._known[row_key(row)] = row
        if rows:
            write_log(self._path, rows)

    def known(self, task: VisualTask) -> dict[str, str]:
        """Predictions by id of the task's questions that were asked in the same words."""
        rows = {item.id: self._known.get((task.name, item.id, item.prompt)) for item in task.items}
        return {name: row["prediction"] for name, row in rows.items() if row is not None}

    def add(self, task: str, item: Item, prediction: str) -> None:
        """Appends the prediction for an item of the task of that name."""
        if self._path is None:
            return
        row = {"task": task, "id": item.id, "prompt": item.prompt}
        row |= {"prediction": prediction, **self.mark}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def row_key(row: Mapping) -> tuple[str, str, str]:
    """What a row answers. Splits may have the same ids: the words belong to it."""
    return row["task"], row["id"], row["prompt"]


def mark_of(row: Mapping) -> dict[str, str]:
    """The fingerprints of the model that made a row; empty where they are not known."""
    return {name: row.get(name, "") for name in ("model", "processor")}


def read_predictions(
    task: VisualTask, path: Path, others: Sequence[VisualTask] = ()
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Predictions by id from a saved file, ours or in the benchmark's own result format, and the
    marks of the models that made them, where the file has them.

    Args:
      task: the task.
      path: the file.
      others: further tasks that are to be read from the same file.

    Raises:
      UserError: when there is no file, it has neither format, it is about other questions, or it
        does not tell the tasks apart.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".jsonl" and path.is_file():
        rows = read_log(path)
        if rows and {"task", "id", "prediction"} <= set(rows[0]):
            own = {row["id"]: row for row in rows if row["task"] == task.name}
            asked = {(task.name, item.id, item.prompt) for item in task.items}
            own |= {row["id"]: row for row in rows if "prompt" in row and row_key(row) in asked}
            found = {name: row["prediction"] for name, row in own.items()}
            return _of_task(task, found, path), {name: mark_of(row) for name, row in own.items()}
    found, ids = task.read(path), {item.id for item in task.items}
    ordered = not isinstance(found, Mapping)
    if any(ordered or not ids.isdisjoint(item.id for item in other.items) for other in others):
        names = ", ".join(f"{each.name}.jsonl" for each in (task, *others))
        raise UserError(
            f"{path} does not say which of {len(others) + 1} tasks its answers belong to; give a "
            f"folder with one file for each, named {names}"
        )
    return _of_task(task, _by_order(task, found, path) if ordered else found, path), {}


def _by_order(task: VisualTask, found: Sequence[Unlabelled], path: Path) -> dict[str, str]:
    """By id, if there is one per question, and the questions beside them are the task's."""
    if len(found) != len(task.items):
        raise UserError(
            f"{path} has no ids and {len(found)} predictions for the {len(task.items)} "
            f"questions of {task.name}"
        )
    for number, (row, item) in enumerate(zip(found, task.items, strict=True)):
        if _words(row.question) not in _words(item.prompt):
            raise UserError(
                f"row {number} of {path} answers {row.question!r}, but that question of "
                f"{task.name} is {item.prompt!r}"
            )
    return {item.id: row.text for row, item in zip(found, task.items, strict=True)}


def _words(text: str) -> str:
    return " ".join(text.replace(IMAGE_MARK, "").casefold().split())


def _of_task(task: VisualTask, found: Mapping[str, str], path: Path) -> dict[str, str]:
    kept = {item.id: found[item.id] for item in task.items if item.id in found}
    if not kept:
        raise UserError(f"{path} has no prediction for any question of {task.name}")
    return kept
