"""IconQA: questions about icon pictures, with choices of text or a blank to fill in.

Files: `SPLIT/choose_txt/ID/{data.json,image.png}`, `SPLIT/fill_in_blank/ID/{data.json,image.png}`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import read_json, record, register_task


@register_task("iconQA-txt")
def choices(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """Questions whose answer is one of several texts."""
    for number, folder, item in _items(root, split, "choose_txt"):
        listed = ", ".join(item["choices"])
        ending = "Choose an option from the choices to answer the question."
        question = f"{item['question']} Choices: {listed}. {ending}"
        answer = item["answer"]  # the choice itself, or its number
        answer = item["choices"][answer] if isinstance(answer, int) else answer
        yield record(number, f"{folder}/image.png", question, answer)


@register_task("iconQA-blank")
def blanks(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """Questions with a blank to fill in."""
    for number, folder, item in _items(root, split, "fill_in_blank"):
        question = f"{item['question']} Fill in the blanks in (_) or answer this question"
        yield record(number, f"{folder}/image.png", question, item["answer"])


def _items(root: Path, split: str, kind: str) -> Iterator[tuple[str, str, dict]]:
    """Number, folder and description of every question, in the order of the numbers."""
    folder = root / split / kind
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for number in sorted(names, key=lambda name: (len(name), name)):
        place = f"{split}/{kind}/{number}"
        yield number, place, read_json(root, f"{place}/data.json")
