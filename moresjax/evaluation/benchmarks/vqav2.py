"""VQAv2 (Goyal et al. 2017): open questions about COCO photos, ten answers each.

Files in `vqav2/`, from https://visualqa.org/download.html:
`v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`, or those of
`train2014`; for the server `v2_OpenEnded_mscoco_test2015_questions.json` and, for test-dev, the
file of `test-dev2015`. Photos in `coco/val2014/`, `coco/train2014/` and `coco/test2015/`; training
files also take them from `vqav2/train2014/`.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from moresjax.evaluation.benchmarks.okvqa import coco_questions, vqa_examples
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    SHORT,
    DataRoot,
    benchmark_folder,
    check_split,
    coco_image,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import normalize_m4c, vqa_accuracy
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SIZES = {"val": 214_354, "train": 443_757, "test": 447_793, "test-dev": 107_394}
ALL = "v2_OpenEnded_mscoco_test2015_questions.json"


@training_records("vqav2")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Short answers; the target is the most frequent of ten."""
    for question, annotation, image in coco_questions(root, split, "v2_"):
        text = f"{question['question']} {SHORT}"
        answer = annotation["multiple_choice_answer"]
        yield llava_record(question["question_id"], image, text, answer)


@benchmark("vqav2")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """VQA accuracy on `val`, `train`; `test-dev` and `test` make the file for the EvalAI server."""
    folder = benchmark_folder("vqav2", data_root)
    check_split("vqav2", split, list(SIZES))
    scorer = example_scorer(
        vqa_accuracy, percent_by("answer_type", "question_type"), "VQA accuracy"
    )
    read = result_reader("question_id", "answer")
    if split in ("val", "train"):
        examples = vqa_examples("v2_", folder, data_root, split)
        examples = limit_rows(examples, limit, f"vqav2 {split}", SIZES[split])
        return [BenchmarkTask("vqav2", examples, scorer=scorer, read=read)]
    file = f"v2_OpenEnded_mscoco_{split}2015_questions.json"
    rows = limit_rows(
        read_json(folder, file)["questions"], limit, f"vqav2 {split}", SIZES[split], split == "test"
    )
    everything = [str(row["question_id"]) for row in read_json(folder, ALL)["questions"]]

    def submission(predictions: Mapping[str, str]) -> str:
        # The server wants all questions of test2015, also from those who answer test-dev.
        return json.dumps(
            [
                {"question_id": int(name), "answer": normalize_m4c(predictions.get(name, ""))}
                for name in everything
            ]
        )

    examples = [
        Example(
            str(row["question_id"]),
            llava_prompt(row["question"]),
            images=(coco_image(data_root, "test2015", row["image_id"]),),
        )
        for row in rows
    ]
    submissions = {"vqav2-submission.json": submission}
    return [BenchmarkTask("vqav2", examples, scorer=scorer, read=read, submissions=submissions)]
