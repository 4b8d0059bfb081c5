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
from collections.abc import Mapping

from moresjax.core.errors import UserError
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import (
    LETTERS,
    PICK_LETTER,
    SHORT,
    choose_split,
    first,
    folder_of,
    read_rows,
)
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
from moresjax.evaluation.scoring import Score
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"validation": 900, "dev": 150, "test": 10_500}
HIDDEN = "?"  # answers of test
_MARK = re.compile(r" ?<image (\d)>")


def _item(row: Mapping) -> Item:
    options = dict(zip(LETTERS + "I", ast.literal_eval(row["options"]), strict=False))
    choice = row["question_type"] == "multiple-choice"
    lines = [row["question"], "", *(f"({letter}) {text}" for letter, text in options.items())]
    text = "\n".join([*lines, *([""] if choice else []), PICK_LETTER if choice else SHORT])
    # Images go first, in the order of their numbers, as in the prompts LLaVA was trained on.
    numbers = sorted(set(_MARK.findall(text)))
    images = tuple(row[f"image_{number}"]["bytes"] for number in numbers)
    prompt = "\n".join([*[IMAGE_MARK] * len(images), _MARK.sub("", text).strip()])
    answer = row["answer"]
    if answer.startswith("["):  # several right ones
        answer = ast.literal_eval(answer)
    facts = {"options": options if choice else {}}
    return Item(row["id"], prompt, None if answer == HIDDEN else answer, images, facts=facts)


def _rows(folder, split: str) -> list[dict]:
    import pyarrow.parquet

    rows = []
    for subject in sorted(name for subjects in DOMAINS.values() for name in subjects):
        files = sorted((folder / subject).glob(f"{split}-*.parquet"))
        if not files:
            raise UserError(f"{folder / subject} has no {split}-*.parquet; task mmmu reads it")
        for file in files:
            rows += pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _answers(items, predictions) -> list[str | None]:
    """Letters of multiple-choice questions, texts of open ones."""
    rng = random.Random(SEED)
    return [
        parse_multi_choice(text, item.facts["options"], rng)
        if text is not None and item.facts["options"]
        else text
        for item, text in zip(items, predictions, strict=True)
    ]


def _score(items, predictions, judge=None) -> Score:
    if any(item.answer is None for item in items):
        return Score("accuracy")
    hits, values = defaultdict(list), []
    for item, text in zip(items, _answers(items, predictions), strict=True):
        if text is None:
            hit = False
        elif item.facts["options"]:
            hit = text in item.answer if isinstance(item.answer, list) else text == item.answer
        else:
            hit = is_open_correct(parse_open(text), item.answer)
        hits[subject_of(item.id)].append(hit)
        values.append(float(hit))
    guessed = sum(
        text is not None and find_option(text, item.facts["options"]) is None
        for item, text in zip(items, predictions, strict=True)
        if item.facts["options"]
    )
    return Score("accuracy", values, mmmu_summary(hits) | {"guessed": guessed, "seed": SEED})


@benchmark("mmmu")
def load(data_root=None, limit: int | None = None, split: str = "validation") -> list[VisualTask]:
    """Accuracy by subject and domain; `test` makes the file for the EvalAI server."""
    folder = folder_of("mmmu", data_root)
    choose_split("mmmu", split, list(SIZES))
    rows = first(_rows(folder, split), limit, f"mmmu {split}", SIZES[split])
    items = [_item(row) for row in rows]

    def submission(predictions: Mapping[str, str]) -> str:
        texts = [predictions[item.id] for item in items]
        answers = _answers(items, texts)
        return json.dumps({item.id: text for item, text in zip(items, answers, strict=True)})

    submit = {"mmmu-submission.json": submission} if split == "test" else None
    read = read_rows("id", "response")
    return [
        VisualTask("mmmu", items, max_new_tokens=1024, score=_score, read=read, submissions=submit)
    ]
