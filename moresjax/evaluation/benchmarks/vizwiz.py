"""VizWiz-VQA (Gurari et al. 2018): photos and questions of blind people, ten answers each.

Files in `vizwiz/`, from https://vizwiz.org/tasks-and-datasets/vqa/: `Annotations/val.json` and
`val/`; for the server `Annotations/test.json` and `test/`.

`vizwiz` asks as LLaVA-1.5 does, `vizwiz_ft` in the words of the data that LLaVA Steering
fine-tunes on.
"""

import json
from collections.abc import Mapping, Sequence

from moresjax.data.generators import SHORT, read_json
from moresjax.data.tasks.vizwiz import HINT
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    llava_prompt,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import normalize_m4c, vqa_accuracy
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"val": 4_319, "test": 8_000}
HINT_LLAVA = "When the provided information is insufficient, respond with 'Unanswerable'."


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    return vqa_accuracy(prediction.lower(), [answer.lower() for answer in answers])


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps(
        [{"image": name, "answer": normalize_m4c(text)} for name, text in predictions.items()]
    )


def _tasks(
    name: str, hint: str, data_root: DataRoot, limit: int | None, split: str
) -> list[BenchmarkTask]:
    folder = benchmark_folder("vizwiz", data_root)
    check_split(name, split, list(SIZES))
    rows = read_json(folder, f"Annotations/{split}.json")
    examples = [
        Example(
            row["image"],
            llava_prompt(row["question"] + hint, ""),
            [answer["answer"] for answer in row["answers"]] if split == "val" else None,
            (folder / split / row["image"],),
            metadata={"answer_type": row.get("answer_type", "")},
        )
        for row in limit_rows(rows, limit, f"{name} {split}", SIZES[split], split == "val")
    ]
    submissions = {f"{name}-submission.json": _submission} if split == "test" else {}
    scorer = example_scorer(_accuracy, percent_by("answer_type"), "VQA accuracy")
    read = result_reader("image", "answer")
    return [BenchmarkTask(name, examples, scorer=scorer, read=read, submissions=submissions)]


@benchmark("vizwiz")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """VQA accuracy on `val`; `test` makes the file for the EvalAI server."""
    return _tasks("vizwiz", f"\n{HINT_LLAVA}\n{SHORT}", data_root, limit, split)


@benchmark("vizwiz_ft")
def load_ft(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """The same after task-specific fine-tuning."""
    return _tasks("vizwiz_ft", f" {HINT} {SHORT}", data_root, limit, split)
