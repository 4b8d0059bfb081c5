"""Flickr30k: one of five captions per photo, asked for in one of nine ways.

Files: `flickr_annotations_30k.csv`, `flickr30k-images/`. The wording of the nine requests is ours.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.data.generators import record, register_task

FILE = "flickr_annotations_30k.csv"
REQUESTS = (
    "Describe this picture in one short sentence.",
    "Say in a few words what can be seen here.",
    "Write a short caption for this photo.",
    "What does this photo show? Be brief.",
    "Sum up the scene in one sentence.",
    "Caption this picture briefly.",
    "In one sentence, what is going on in this picture?",
    "Give a short description of the scene.",
    "Tell me briefly what is in this photo.",
)


@register_task("flickr30k")
def records(root: Path, split: str, rng: random.Random) -> Iterator[dict]:
    """One caption of every photo."""
    if not (root / FILE).is_file():
        raise UserError(f"{root / FILE} does not exist; it belongs to the task's official download")
    with (root / FILE).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] != split:
                continue
            caption = rng.choice(json.loads(row["raw"]))
            image = f"flickr30k-images/{row['filename']}"
            yield record(row["img_id"], image, rng.choice(REQUESTS), caption)
