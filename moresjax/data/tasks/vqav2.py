"""VQAv2: short answers about COCO photos; the target is the most frequent of ten.

Files: `v2_OpenEnded_mscoco_SPLIT2014_questions.json`, `v2_mscoco_SPLIT2014_annotations.json`,
`SPLIT2014/`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import SHORT, coco_questions, record, register_task


@register_task("vqav2")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """The most frequent answer to every question."""
    for question, annotation, image in coco_questions(root, split, "v2_"):
        text = f"{question['question']} {SHORT}"
        answer = annotation["multiple_choice_answer"]
        yield record(question["question_id"], image, text, answer)
