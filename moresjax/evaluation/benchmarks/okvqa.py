"""OK-VQA (Marino et al. 2019): questions about COCO photos that need outside knowledge.

Files in `okvqa/`, from https://okvqa.allenai.org/download.html:
`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`.
Photos in `coco/val2014/`, for training files in `coco/train2014/` or in `okvqa/train2014/`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    coco_image,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import vqa_accuracy
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import SHARED, Record, llava_record, training_records

SIZE = 5_046


def coco_questions(folder: Path, split: str, prefix: str) -> Iterator[tuple[dict, dict, str]]:
    """Question, annotation and image of VQA files over COCO.

    Args:
      folder: The folder of the files.
      split: `train` or `val`.
      prefix: The prefix of the files' version, such as `v2_`.

    Raises:
      UserError: A file is missing or broken, or a question has no annotation.
    """
    asked = read_json(folder, f"{prefix}OpenEnded_mscoco_{split}2014_questions.json")["questions"]
    file = f"{prefix}mscoco_{split}2014_annotations.json"
    answered = {a["question_id"]: a for a in read_json(folder, file)["annotations"]}
    # Where evaluations find them, if they are there.
    photos = f"{split}2014"
    if (folder.parent / "coco" / photos).is_dir():
        photos = f"{SHARED}{photos}"
    for question in asked:
        number = question["question_id"]
        if number not in answered:
            raise UserError(f"question {number} has no annotation in {folder / file}")
        image = f"{photos}/COCO_{split}2014_{question['image_id']:012d}.jpg"
        yield question, answered[number], image


@training_records("okvqa")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """The question alone, with a random one of its ten answers."""
    for question, annotation, image in coco_questions(root, split, ""):
        answer = rng.choice(annotation["answers"])["answer"]
        yield llava_record(question["question_id"], image, question["question"], answer)


def vqa_examples(
    prefix: str, folder: Path, data_root: DataRoot, split: str = "val"
) -> list[Example]:
    """All questions of a split of 2014 in the VQA format; `prefix` is the files' version's."""
    return [
        Example(
            str(question["question_id"]),
            llava_prompt(question["question"]),
            [answer["answer"] for answer in annotation["answers"]],
            (coco_image(data_root, f"{split}2014", question["image_id"]),),
            metadata={
                "answer_type": annotation["answer_type"],
                "question_type": annotation["question_type"],
            },
        )
        for question, annotation, _ in coco_questions(folder, split, prefix)
    ]


@benchmark("okvqa")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """VQA accuracy on `val`."""
    folder = benchmark_folder("okvqa", data_root)
    check_split("okvqa", split, ("val",))
    examples = limit_rows(vqa_examples("", folder, data_root), limit, "okvqa val", SIZE)
    scorer = example_scorer(vqa_accuracy, percent_by("question_type"), "VQA accuracy")
    return [
        BenchmarkTask("okvqa", examples, scorer=scorer, read=result_reader("question_id", "answer"))
    ]
