"""VizWiz-VQA (Gurari et al. 2018): photos and questions of blind people, ten answers each.

Files in `vizwiz/`, from https://vizwiz.org/tasks-and-datasets/vqa/: `Annotations/val.json` and
`val/`; for the server `Annotations/test.json` and `test/`.

`vizwiz` asks as LLaVA-1.5 does, `vizwiz_ft` in the words of the data that LLaVA Steering
fine-tunes on.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    SHORT,
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import normalize_m4c, vqa_accuracy
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SIZES = {"val": 4_319, "test": 8_000}
NO_ANSWER = "Unanswerable"
HINT = f'When the information is insufficient, respond with "{NO_ANSWER}".'
WEIGHTS = {"yes": 3, "maybe": 1}  # of an answer, by the annotator's confidence
HINT_LLAVA = "When the provided information is insufficient, respond with 'Unanswerable'."


@training_records("vizwiz")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Questions with a random answer, surer ones more often; some cannot be answered."""
    for item in read_json(root, f"Annotations/{split}.json"):
        question = f"{item['question']} {HINT} {SHORT}"
        image = f"{split}/{item['image']}"
        yield llava_record(item["image"], image, question, _draw_answer(item, rng))


def _draw_answer(item: Mapping, rng: random.Random) -> str:
    usable = [
        answer
        for answer in item["answers"]
        if answer["answer_confidence"] in WEIGHTS and answer["answer"].lower() != "unanswerable"
    ]
    if not item["answerable"] or not usable:
        return NO_ANSWER
    weights = [WEIGHTS[answer["answer_confidence"]] for answer in usable]
    return rng.choices(usable, weights)[0]["answer"]


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
            (image_file(folder / split, row["image"], row["image"]),),
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
