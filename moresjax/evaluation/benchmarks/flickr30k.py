"""Flickr30k captions (Young et al. 2014) on Karpathy's splits.

Files in `flickr30k/`, from https://huggingface.co/datasets/nlphuji/flickr30k:
`flickr_annotations_30k.csv` and `flickr30k-images/`.
"""

import csv
import json

from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import (
    CAPTION,
    ask,
    choose_split,
    first,
    folder_of,
    need_file,
    read_rows,
)
from moresjax.evaluation.scoring import captions
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"test": 1_000, "val": None}


@benchmark("flickr30k")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """CIDEr-D, BLEU and ROUGE-L."""
    folder = folder_of("flickr30k", data_root)
    choose_split("flickr30k", split, list(SIZES))
    path = need_file(folder / "flickr_annotations_30k.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    items = [
        Item(
            row["img_id"],
            ask(CAPTION, ""),
            json.loads(row["raw"]),
            (folder / "flickr30k-images" / row["filename"],),
        )
        for row in first(rows, limit, f"flickr30k {split}", SIZES[split])
    ]
    read = read_rows("image_id", "caption")
    return [VisualTask("flickr30k", items, max_new_tokens=64, score=captions, read=read)]
