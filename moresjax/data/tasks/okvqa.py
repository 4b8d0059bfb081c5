"""OK-VQA: questions about COCO photos that need outside knowledge; one of ten answers each.

Files: `OpenEnded_mscoco_SPLIT2014_questions.json`, `mscoco_SPLIT2014_annotations.json`,
`SPLIT2014/`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.data.generators import coco_questions, record, register_task


@register_task("okvqa")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """One answer to every question."""
    for question, annotation, image in coco_questions(root, split, ""):
        answer = rng.choice(annotation["answers"])["answer"]
        yield record(question["question_id"], image, question["question"], answer)
