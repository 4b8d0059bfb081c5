"""TextVQA (Singh et al. 2019): questions about the text in photos, ten answers each.

Files in `textvqa/`, from https://textvqa.org/dataset/: `TextVQA_0.5.1_val.json`,
`TextVQA_Rosetta_OCR_v0.2_val.json`, and `train_images/` (which holds the photos of val too); for
the server the two files of `test` and `test_images/`. As LLaVA-1.5 does, prompts list the tokens
an OCR system found.

`textvqa_judged` scores the most frequent answer by MRT's judge.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.judged import rule_mrt
from moresjax.evaluation.metrics.vqa import m4c_accuracy
from moresjax.evaluation.scoring import example_scorer, same_answer_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"val": 5_000, "test": None}


def ocr_lines(folder: Path, split: str) -> dict[str, str]:
    """The line that lists an image's OCR tokens, by image."""
    found = read_json(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
    return {
        row["image_id"]: f"Reference OCR token: {', '.join(row['ocr_tokens'])}" for row in found
    }


def _examples(name: str, data_root: DataRoot, limit: int | None, split: str) -> list[Example]:
    folder = benchmark_folder("textvqa", data_root)
    check_split(name, split, list(SIZES))
    rows = read_json(folder, f"TextVQA_0.5.1_{split}.json")["data"]
    lines = ocr_lines(folder, split)
    photos = folder / ("test_images" if split == "test" else "train_images")
    return [
        Example(
            str(row["question_id"]),
            llava_prompt(
                f"{row['question']}\n{lines.get(row['image_id'], 'Reference OCR token: ')}"
            ),
            row.get("answers"),
            (image_file(photos, f"{row['image_id']}.jpg", row["question_id"]),),
        )
        for row in limit_rows(rows, limit, f"{name} {split}", SIZES[split])
    ]


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps(
        [{"question_id": int(name), "answer": text} for name, text in predictions.items()]
    )


@benchmark("textvqa")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """VQA accuracy of M4C's evaluator on `val`; `test` makes the file for the EvalAI server."""
    examples = _examples("textvqa", data_root, limit, split)
    scorer = example_scorer(m4c_accuracy, name="VQA accuracy")
    read = result_reader("question_id", "answer")
    submissions = {"textvqa-submission.json": _submission} if split == "test" else {}
    return [BenchmarkTask("textvqa", examples, scorer=scorer, read=read, submissions=submissions)]


@benchmark("textvqa_judged")
def load_judged(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """Share of answers that a judge finds equal to the most frequent one."""
    check_split("textvqa_judged", split, ("val",))
    examples = [
        Example(
            example.id, example.prompt, Counter(example.answer).most_common(1)[0][0], example.images
        )
        for example in _examples("textvqa_judged", data_root, limit, split)
    ]
    scorer = same_answer_scorer(lambda text, answer: float(rule_mrt(text, answer) == "Yes"))
    read = result_reader("question_id", "answer")
    return [BenchmarkTask("textvqa_judged", examples, scorer=scorer, read=read)]
