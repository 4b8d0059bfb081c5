"""VizWiz-VQA: photos and questions of blind people, some of which cannot be answered.

Files: `Annotations/SPLIT.json`, `SPLIT/VizWiz_SPLIT_00000000.jpg`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import SHORT, read_json, record, register_task

NO_ANSWER = "Unanswerable"
HINT = f'When the information is insufficient, respond with "{NO_ANSWER}".'
WEIGHTS = {"yes": 3, "maybe": 1}  # by how sure the person was who answered


@register_task("vizwiz")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """One answer to every question."""
    for item in read_json(root, f"Annotations/{split}.json"):
        question = f"{item['question']} {HINT} {SHORT}"
        image = f"{split}/{item['image']}"
        yield record(item["image"], image, question, _answer(item, rng))


def _answer(item: dict, rng: random.Random) -> str:
    """A random answer, surer ones more often."""
    usable = [
        answer
        for answer in item["answers"]
        if answer["answer_confidence"] in WEIGHTS and answer["answer"].lower() != "unanswerable"
    ]
    if not item["answerable"] or not usable:
        return NO_ANSWER
    weights = [WEIGHTS[answer["answer_confidence"]] for answer in usable]
    return rng.choices(usable, weights)[0]["answer"]
