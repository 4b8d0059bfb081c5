"""VizWiz-VQA (Gurari et al. 2018): photos and questions of blind people, ten answers each.

Files in `vizwiz/`, from https://vizwiz.org/tasks-and-datasets/vqa/: `Annotations/val.json` and
`val/`; for the server `Annotations/test.json` and `test/`.

`vizwiz` asks as LLaVA-1.5 does, `vizwiz_ft` as in the data LLaVA Steering fine-tunes on.
"""

import json
from collections.abc import Mapping, Sequence

from moresjax.data.generators import SHORT, read_json
from moresjax.data.tasks.vizwiz import HINT
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.vqa import normalize_m4c, vqa_accuracy
from moresjax.evaluation.scoring import by_item, percent_by
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"val": 4_319, "test": 8_000}
HINT_LLAVA = "When the provided information is insufficient, respond with 'Unanswerable'."


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    return vqa_accuracy(prediction.lower(), [answer.lower() for answer in answers])


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps(
        [{"image": name, "answer": normalize_m4c(text)} for name, text in predictions.items()]
    )


def _tasks(name: str, hint: str, data_root, limit: int | None, split: str) -> list[VisualTask]:
    folder = folder_of("vizwiz", data_root)
    choose_split(name, split, list(SIZES))
    rows = read_json(folder, f"Annotations/{split}.json")
    items = [
        Item(
            row["image"],
            ask(row["question"] + hint, ""),
            [answer["answer"] for answer in row["answers"]] if split == "val" else None,
            (folder / split / row["image"],),
            facts={"answer_type": row.get("answer_type", "")},
        )
        for row in first(rows, limit, f"{name} {split}", SIZES[split], split == "val")
    ]
    submit = {f"{name}-submission.json": _submission} if split == "test" else None
    score = by_item(_accuracy, percent_by("answer_type"), "VQA accuracy")
    read = read_rows("image", "answer")
    return [VisualTask(name, items, score=score, read=read, submissions=submit)]


@benchmark("vizwiz")
def load(data_root=None, limit: int | None = None, split: str = "val") -> list[VisualTask]:
    """VQA accuracy on `val`; `test` makes the file for the EvalAI server."""
    return _tasks("vizwiz", f"\n{HINT_LLAVA}\n{SHORT}", data_root, limit, split)


@benchmark("vizwiz_ft")
def load_ft(data_root=None, limit: int | None = None, split: str = "val") -> list[VisualTask]:
    """The same after task-specific fine-tuning."""
    return _tasks("vizwiz_ft", f" {HINT} {SHORT}", data_root, limit, split)
