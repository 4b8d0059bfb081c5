"""IconQA (Lu et al. 2021): questions about icon pictures.

Files in `iconqa/`, from https://iconqa.github.io (`iconqa_data.zip`): `test/choose_txt/ID/` and
`test/fill_in_blank/ID/`, each with `data.json` and `image.png`. Prompts and targets are those of
the data that LLaVA Steering fine-tunes on.
"""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    choice_reader,
    example_from_record,
    limit_rows,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.choices import iconqa_correct
from moresjax.evaluation.scoring import example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SIZES = {"iconqa_txt": {"test": 6_316, "val": 6_316}, "iconqa_blank": {"test": 3_638, "val": 3_638}}


@training_records("iconqa_txt")
def text_records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Questions whose answer is one of several texts."""
    for number, folder, item in _items(root, split, "choose_txt"):
        listed = ", ".join(item["choices"])
        ending = "Choose an option from the choices to answer the question."
        question = f"{item['question']} Choices: {listed}. {ending}"
        answer = item["answer"]  # the choice itself, or its number
        answer = item["choices"][answer] if isinstance(answer, int) else answer
        yield llava_record(number, f"{folder}/image.png", question, answer)


@training_records("iconqa_blank")
def blank_records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Questions with a blank to fill in."""
    for number, folder, item in _items(root, split, "fill_in_blank"):
        question = f"{item['question']} Fill in the blanks in (_) or answer this question"
        yield llava_record(number, f"{folder}/image.png", question, item["answer"])


def _items(root: Path, split: str, kind: str) -> Iterator[tuple[str, str, dict]]:
    """Number, folder and description of every question, in the order of the numbers."""
    folder = root / split / kind
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for number in sorted(names, key=lambda name: (len(name), name)):
        place = f"{split}/{kind}/{number}"
        yield number, place, read_json(root, f"{place}/data.json")


KINDS = {
    "iconqa_txt": ("choose_txt", text_records),
    "iconqa_blank": ("fill_in_blank", blank_records),
}


def _tasks(name: str, data_root: DataRoot, limit: int | None, split: str) -> list[BenchmarkTask]:
    folder = benchmark_folder("iconqa", data_root)
    check_split(name, split, list(SIZES[name]))
    kind, records = KINDS[name]
    if not (folder / split / kind).is_dir():
        raise UserError(f"{folder / split / kind} does not exist; task {name} reads it")
    rows = list(records(folder, split, random.Random()))
    rows = limit_rows(rows, limit, f"{name} {split}", SIZES[name][split])
    examples = [example_from_record(row, folder) for row in rows]
    scorer = example_scorer(iconqa_correct)

    @functools.cache
    def choices() -> dict[str, list[str]]:
        items = _items(folder, split, kind)
        return {number: item["choices"] for number, _, item in items if "choices" in item}

    def choice(number: str, index: int) -> str:
        if number not in choices():  # a blank that is filled with a number, or another question
            return str(index)
        texts = choices()[number]
        return texts[index] if 0 <= index < len(texts) else ""

    read = choice_reader(result_reader("question_id", "text"), choice)
    return [BenchmarkTask(name, examples, max_new_tokens=1024, scorer=scorer, read=read)]


@benchmark("iconqa_txt")
def load_txt(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy of chosen texts."""
    return _tasks("iconqa_txt", data_root, limit, split)


@benchmark("iconqa_blank")
def load_blank(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy of filled blanks."""
    return _tasks("iconqa_blank", data_root, limit, split)
