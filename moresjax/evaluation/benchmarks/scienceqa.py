"""ScienceQA (Lu et al. 2022): multiple-choice science questions, half of them with an image.

Files in `scienceqa/`, from https://scienceqa.github.io: `problems.json`, `pid_splits.json`, and
images as `test/ID/image.png` and `val/ID/image.png`.

`scienceqa` asks everything and `scienceqa_img` the questions with an image, both as LLaVA-1.5 does;
`scienceqa_img_ft` asks the latter as in the data LLaVA Steering fine-tunes on.
"""

import random

from moresjax.data.generators import read_json
from moresjax.data.tasks.scienceqa import records
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import (
    LETTERS,
    PICK_LETTER,
    ask,
    choose_split,
    first,
    folder_of,
    read_rows,
    record_item,
    with_options,
)
from moresjax.evaluation.metrics.choices import scienceqa_letter, scienceqa_summary
from moresjax.evaluation.scoring import by_item
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"test": 4_241, "val": 4_241, "minitest": 424, "minival": 424}
WITH_IMAGE = 2_017  # of test
MAX_NEW_TOKENS = 1024


def _task(name: str, items: list[Item]) -> list[VisualTask]:
    # A letter beyond a question's choices is never its answer.
    score = by_item(
        lambda text, answer: float(scienceqa_letter(text) == answer),
        lambda items, texts, values: scienceqa_summary(
            [item.facts for item in items], [bool(value) for value in values]
        ),
    )
    read = read_rows("question_id", "text")
    return [VisualTask(name, items, max_new_tokens=MAX_NEW_TOKENS, score=score, read=read)]


def _item(folder, name: str, problem: dict) -> Item:
    question = with_options(problem["question"], problem["choices"])
    if problem["hint"]:
        question = f"Context: {problem['hint']}\n{question}"
    # Smaller splits, like minitest, are parts of the large ones and have no images of their own.
    image = problem["image"]
    images = (folder / problem["split"] / name / image,) if image else ()
    prompt = ask(question, PICK_LETTER, len(images))
    return Item(name, prompt, LETTERS[problem["answer"]], images, facts=problem)


def _read(data_root, name: str, split: str):
    """Folder, problems by id, and the ids of the split."""
    folder = folder_of("scienceqa", data_root)
    choose_split(name, split, list(SIZES))
    problems = read_json(folder, "problems.json")
    return folder, problems, read_json(folder, "pid_splits.json")[split]


@benchmark("scienceqa")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy, also by subject, context and grade."""
    folder, problems, names = _read(data_root, "scienceqa", split)
    names = first(names, limit, f"scienceqa {split}", SIZES[split])
    return _task("scienceqa", [_item(folder, n, problems[n]) for n in names])


@benchmark("scienceqa_img")
def load_img(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy over the questions with an image."""
    folder, problems, names = _read(data_root, "scienceqa_img", split)
    shown = [name for name in names if problems[name]["image"]]
    size = WITH_IMAGE if split == "test" else None
    shown = first(shown, limit, f"scienceqa_img {split}", size, sure=False)
    return _task("scienceqa_img", [_item(folder, n, problems[n]) for n in shown])


@benchmark("scienceqa_img_ft")
def load_ft(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """The same after task-specific fine-tuning."""
    folder, problems, _ = _read(data_root, "scienceqa_img_ft", split)
    size = WITH_IMAGE if split == "test" else None
    rows = list(records(folder, split, random.Random()))
    rows = first(rows, limit, f"scienceqa_img_ft {split}", size, sure=False)
    items = [record_item(row, folder, problems[row["id"]]) for row in rows]
    return _task("scienceqa_img_ft", items)
