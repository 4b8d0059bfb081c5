"""ScienceQA: questions with an image, answered by the letter of an option.

Files: `problems.json`, `pid_splits.json`, `SPLIT/ID/image.png`, where SPLIT is train,
val or test: trainval and the small splits consist of questions of these.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import read_json, record, register_task

LETTERS = "ABCDEFGH"


@register_task("scienceQA")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """The letter of the right option for every question with an image."""
    problems = read_json(root, "problems.json")
    for number in read_json(root, "pid_splits.json").get(split, ()):
        problem = problems[number]
        if not problem["image"]:  # half of the questions are text alone
            continue
        pairs = zip(LETTERS, problem["choices"], strict=False)
        options = ", ".join(f"{letter}.{choice}" for letter, choice in pairs)
        image = f"{problem['split']}/{number}/{problem['image']}"
        question = f"{problem['question']} {options}"
        yield record(number, image, question, LETTERS[problem["answer"]])
