"""MMMU (Yue et al. 2024): college exams in thirty subjects.

Files in `mmmu/`, from https://huggingface.co/datasets/MMMU/MMMU: a folder per subject with its
`validation-*.parquet`, `dev-*.parquet` or `test-*.parquet`. Prompts are LLaVA-1.5's; its evaluation
guesses where a question has several images, here all of them are shown.
"""

import ast
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.data.images import UnusableImage
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    LETTERS,
    PICK_LETTER,
    SHORT,
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    result_reader,
)
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.mmmu import (
    DOMAINS,
    SEED,
    find_option,
    is_open_correct,
    mmmu_summary,
    parse_multi_choice,
    parse_open,
    subject_of,
)
from moresjax.evaluation.scoring import Predictions, TaskScore
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"validation": 900, "dev": 150, "test": 10_500}
HIDDEN = "?"  # answers of test
_MARK = re.compile(r" ?<image (\d+)>")


def _example(row: Mapping) -> Example:
    options = dict(zip(LETTERS + "I", ast.literal_eval(row["options"]), strict=False))
    choice = row["question_type"] == "multiple-choice"
    lines = [row["question"], "", *(f"({letter}) {text}" for letter, text in options.items())]
    text = "\n".join([*lines, *([""] if choice else []), PICK_LETTER if choice else SHORT])
    # LLaVA's training data have the images before the question.
    shown = {int(number): row.get(f"image_{number}") for number in _MARK.findall(text)}
    shown = {number: image for number, image in sorted(shown.items()) if image is not None}
    images = tuple(
        image["bytes"] or UnusableImage(f"image_{number} of {row['id']} is empty")
        for number, image in shown.items()
    )
    # A mark without an image is text, such as `<image 30>` in an option of `validation_Math_7`.
    text = _MARK.sub(lambda mark: "" if int(mark[1]) in shown else mark[0], text)
    prompt = "\n".join([*[IMAGE_MARK] * len(images), text.strip()])
    answer = row["answer"]
    if answer.startswith("["):  # several right ones
        answer = ast.literal_eval(answer)
    metadata = {"options": options if choice else {}}
    return Example(
        row["id"], prompt, None if answer == HIDDEN else answer, images, metadata=metadata
    )


def _rows(folder: Path, split: str) -> list[dict]:
    import pyarrow.parquet

    rows = []
    for subject in sorted(name for subjects in DOMAINS.values() for name in subjects):
        files = sorted((folder / subject).glob(f"{split}-*.parquet"))
        if not files:
            raise UserError(f"{folder / subject} has no {split}-*.parquet; task mmmu reads it")
        for file in files:
            rows += pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _answers(examples: Sequence[Example], predictions: Predictions) -> list[str | None]:
    """Letters of multiple-choice questions, texts of open ones."""
    rng = random.Random(SEED)
    return [
        parse_multi_choice(text, example.metadata["options"], rng)
        if text is not None and example.metadata["options"]
        else text
        for example, text in zip(examples, predictions, strict=True)
    ]


def _scorer(
    examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
) -> TaskScore:
    if any(example.answer is None for example in examples):
        return TaskScore("accuracy")
    hits, values = defaultdict(list), []
    for example, text in zip(examples, _answers(examples, predictions), strict=True):
        if text is None:
            hit = False
        elif example.metadata["options"]:
            hit = (
                text in example.answer
                if isinstance(example.answer, list)
                else text == example.answer
            )
        else:
            hit = is_open_correct(parse_open(text), example.answer)
        hits[subject_of(example.id)].append(hit)
        values.append(float(hit))
    guessed = sum(
        text is not None and find_option(text, example.metadata["options"]) is None
        for example, text in zip(examples, predictions, strict=True)
        if example.metadata["options"]
    )
    return TaskScore("accuracy", values, mmmu_summary(hits) | {"guessed": guessed, "seed": SEED})


@benchmark("mmmu")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "validation"
) -> list[BenchmarkTask]:
    """Accuracy by subject and domain; `test` makes the file for the EvalAI server."""
    folder = benchmark_folder("mmmu", data_root)
    check_split("mmmu", split, list(SIZES))
    rows = limit_rows(_rows(folder, split), limit, f"mmmu {split}", SIZES[split])
    examples = [_example(row) for row in rows]

    def submission(predictions: Mapping[str, str]) -> str:
        texts = [predictions[example.id] for example in examples]
        answers = _answers(examples, texts)
        return json.dumps(
            {example.id: text for example, text in zip(examples, answers, strict=True)}
        )

    submissions = {"mmmu-submission.json": submission} if split == "test" else {}
    read = result_reader("id", "response")
    return [
        BenchmarkTask(
            "mmmu",
            examples,
            max_new_tokens=1024,
            scorer=_scorer,
            read=read,
            submissions=submissions,
        )
    ]
