"""IconQA (Lu et al. 2021): questions about icon pictures.

Files in `iconqa/`, from https://iconqa.github.io (`iconqa_data.zip`): `test/choose_txt/ID/` and
`test/fill_in_blank/ID/`, each with `data.json` and `image.png`. Prompts and targets are those of
the data that LLaVA Steering fine-tunes on.
"""

import random

from moresjax.core.errors import UserError
from moresjax.data.tasks.iconqa import blanks, choices
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    example_from_record,
    limit_rows,
    result_reader,
)
from moresjax.evaluation.metrics.choices import iconqa_correct
from moresjax.evaluation.scoring import example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"iconqa_txt": {"test": 6_316, "val": 6_316}, "iconqa_blank": {"test": 3_638, "val": 3_638}}
KINDS = {"iconqa_txt": ("choose_txt", choices), "iconqa_blank": ("fill_in_blank", blanks)}


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
    read = result_reader("question_id", "text")
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
