"""What answers looked at: kept for each question beside the predictions, and summed up in a file.

`attention.jsonl` has a row for each answered question, written just before its prediction, so that
an evaluation that goes on asks only what has both: its statistics are those of one that was never
stopped. `attention.json` holds the summary, by the name of the model. `attention_maps.npz` holds
where the answers to a few questions looked on their images.

Axis legend: L layers, N heads, C = 4 groups of tokens, Y, X patches or pixels.
"""

import base64
import dataclasses
import io
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from moresjax.analysis.attention import AnswerAttention, AttentionSummary, summarize_answers
from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.json_files import append_log, read_log, write_json, write_log
from moresjax.evaluation.examples import Example
from moresjax.evaluation.predictions import row_key
from moresjax.evaluation.rows import AttentionRow
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.analyze import answer_map
from moresjax.inference.model import Model

LOG, SUMMARY, MAPS = "attention.jsonl", "attention.json", "attention_maps.npz"
MAPPED = 3  # questions whose answers are shown on their images


class AttentionLog:
    """Attention statistics of one model's answers that survive a killed process.

    Args:
      out: The directory of `attention.jsonl`; without one they are kept in memory.
      provenance: `model`, `processor` and `weights`; rows with others are dropped.
    """

    def __init__(self, out: str | Path | None, provenance: Mapping[str, str]) -> None:
        self._path, self._provenance = None if out is None else Path(out) / LOG, dict(provenance)
        self._known: dict[tuple[str, str, str], AnswerAttention] = {}
        if self._path is None:
            return
        rows = {
            row_key(row): row for row in read_log(self._path, AttentionRow) if self._is_own(row)
        }
        self._known = {key: _from_row(row, self._path) for key, row in rows.items()}
        if self._path.exists():
            write_log(self._path, rows.values())

    def _is_own(self, row: Mapping) -> bool:
        return {name: row.get(name) for name in self._provenance} == self._provenance

    def known(self, task: BenchmarkTask) -> dict[str, AnswerAttention]:
        """Statistics by id for the task's questions that were asked in the same words."""
        keys = {example.id: (task.name, example.id, example.prompt) for example in task.examples}
        return {name: self._known[key] for name, key in keys.items() if key in self._known}

    def add(self, task: str, example: Example, answer: AnswerAttention) -> None:
        """Appends the statistics of the answer to an example of the task of that name."""
        key = task, example.id, example.prompt
        self._known[key] = answer
        if self._path is None:
            return
        row = dict(zip(("task", "id", "prompt"), key, strict=True)) | self._provenance
        append_log(self._path, row | _to_row(answer))

    def summaries(
        self, tasks: Iterable[BenchmarkTask]
    ) -> tuple[AttentionSummary | None, dict[str, AttentionSummary]]:
        """The statistics over all questions of the tasks, and over those of each of them.

        There are none where no answer was written about an image.
        """
        found = {task.name: list(self.known(task).values()) for task in tasks}
        each = {name: summarize_answers(answers) for name, answers in found.items()}
        whole = summarize_answers(list(itertools.chain(*found.values())))
        return whole, {name: one for name, one in each.items() if one is not None}


def _to_row(answer: AnswerAttention) -> dict[str, Any]:
    """The fields of a row: the masses of all heads as base64 of little-endian fp32."""
    mass = np.asarray(answer.mass, "<f4")
    return {
        "tokens": np.asarray(answer.tokens).tolist(),
        "has_image": answer.has_image,
        "visual_share": answer.visual_share,
        "score": answer.score.tolist(),
        "mass_shape": list(mass.shape),
        "mass": base64.b64encode(mass.tobytes()).decode(),
    }


def _from_row(row: Mapping[str, Any], path: Path) -> AnswerAttention:
    try:
        mass = np.frombuffer(base64.b64decode(row["mass"]), "<f4").reshape(row["mass_shape"])
        score = np.asarray(row["score"], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: the attention of question {row['id']!r}: {error}") from None
    return AnswerAttention(mass, score, np.asarray(row["tokens"], np.int32), row["has_image"])


def check_attention(tasks: Sequence[BenchmarkTask]) -> None:
    """Raises a `UserError` for tasks without a written answer about an image."""
    written = [task for task in tasks if not task.ranks_choices]
    if not any(example.images for task in written for example in task.examples):
        names = ", ".join(task.name for task in tasks) or "no task"
        raise UserError(
            f"attention statistics are about written answers to questions with images, and {names} "
            "has none"
        )


def attention_entry(
    attention: AttentionSummary,
    by_task: Mapping[str, AttentionSummary],
    scores: Mapping[str, Mapping[str, Any]],
    **facts: Any,
) -> dict[str, Any]:
    """What `attention.json` says of a model.

    Args:
      attention: The statistics over all questions.
      by_task: Those of each task.
      scores: The tasks' scores.
      facts: Where the model comes from: `model`, `adapter`, `fingerprint`, `template`
        and `accuracy`.
    """
    return {
        **attention.to_dict(by_head=True),
        **facts,
        "n": sum(entry["n"] for entry in scores.values()),
        "tasks": {name: _asked(entry, by_task.get(name)) for name, entry in scores.items()},
    }


def _asked(entry: Mapping[str, Any], attention: AttentionSummary | None) -> dict[str, Any]:
    """What a model was asked in a task."""
    asked = {
        "benchmark": entry["benchmark"],
        "split": entry["split"],
        "n": entry["n"],
        "score": entry["score"],
        "prompt_hash": entry["prompt_hash"],
    }
    if attention is None:
        return asked
    names = "samples", "average_visual_share", "lmar_of_means"
    return asked | {name: attention.to_dict()[name] for name in names}


def attention_line(name: str, summary: Mapping[str, Any]) -> str:
    """Average visual attention and LMAR of a model in a line."""
    ratios = " ".join(f"{x:.2f}" for x in summary["lmar_of_means"]["text"])
    return (
        f"{name:20s} average visual attention {summary['average_visual_share']:.3f}  LMAR {ratios}"
    )


def write_attention(entries: Mapping[str, Mapping[str, Any]], out: str | Path) -> Path:
    """Writes `attention.json`: by the names of models what `attention_entry` says of them."""
    path = Path(out) / SUMMARY
    write_json(path, entries)
    return path


@dataclasses.dataclass(frozen=True)
class AnswerOnImage:
    """Where an answer looked on its image.

    Attributes:
      task: The task's name.
      id: The question's name in it.
      question: The prompt.
      prediction: The model's answer.
      answer: The true answer as text; empty where it is not known.
      image: The image as the model was given it.
      grid: Attention on the patches of the image, mean over heads and over the answer's tokens.
    """

    task: str
    id: str
    question: str
    prediction: str
    answer: str
    image: UInt8[np.ndarray, "Y X 3"]
    grid: Float[np.ndarray, "L _ _"]


def write_maps(
    model: Model,
    tasks: Sequence[BenchmarkTask],
    predictions: Sequence[Mapping],
    log: AttentionLog,
    out: str | Path,
) -> None:
    """Reads the answers to a few questions again, in one forward pass each, and keeps their maps.

    Nothing is generated: the pass is over the question with the tokens of its answer. Where no
    answer has a map, a warning says why.
    """
    texts = {row_key(row): row["prediction"] for row in predictions}
    found, reason = [], "no question with one image was answered"
    for task, example in _with_one_image(tasks):
        key, known = (task.name, example.id, example.prompt), log.known(task)
        if len(found) == MAPPED or key not in texts or example.id not in known:
            continue
        try:
            tokens = known[example.id].tokens
            image, grid = answer_map(
                model, example.prompt, example.images, tokens, **example.pointed
            )
        except UserError as error:
            reason = str(error)
            continue
        answer = "" if example.answer is None else str(example.answer)
        found.append(AnswerOnImage(*key, texts[key], answer, image, grid))
    if not found:
        logging.getLogger(__name__).warning(f"no answer is shown on its image: {reason}")
        return
    about = ("task", "id", "question", "prediction", "answer")
    arrays: dict[str, Any] = {
        f"{number}.{name}": getattr(one, name)
        for number, one in enumerate(found)
        for name in ("image", "grid")
    }
    arrays["items"] = json.dumps([{name: getattr(one, name) for name in about} for one in found])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    replace_file(Path(out) / MAPS, buffer.getvalue())


def read_maps(path: Path) -> list[AnswerOnImage]:
    """What `write_maps` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        items = json.loads(str(arrays["items"]))
        return [
            AnswerOnImage(**item, image=arrays[f"{number}.image"], grid=arrays[f"{number}.grid"])
            for number, item in enumerate(items)
        ]


def _with_one_image(tasks: Sequence[BenchmarkTask]) -> Iterable[tuple[BenchmarkTask, Example]]:
    """Questions with written answers about one image: the first of every task, then the second."""
    own = [
        [(task, example) for example in task.examples if len(example.images) == 1]
        for task in tasks
        if not task.ranks_choices
    ]
    for pairs in itertools.zip_longest(*own):
        yield from (pair for pair in pairs if pair is not None)
