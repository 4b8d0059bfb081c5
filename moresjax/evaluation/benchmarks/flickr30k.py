"""Flickr30k captions (Young et al. 2014) on Karpathy's splits.

Files in `flickr30k/`, from https://huggingface.co/datasets/nlphuji/flickr30k:
`flickr_annotations_30k.csv` and `flickr30k-images/`.
"""

import csv
import json

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    CAPTION,
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    llava_prompt,
    require_file,
    result_reader,
)
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"test": 1_000, "val": None}


@benchmark("flickr30k")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """CIDEr-D, BLEU and ROUGE-L."""
    folder = benchmark_folder("flickr30k", data_root)
    check_split("flickr30k", split, list(SIZES))
    path = require_file(folder / "flickr_annotations_30k.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    examples = [
        Example(
            row["img_id"],
            llava_prompt(CAPTION, ""),
            json.loads(row["raw"]),
            (folder / "flickr30k-images" / row["filename"],),
        )
        for row in limit_rows(rows, limit, f"flickr30k {split}", SIZES[split])
    ]
    read = result_reader("image_id", "caption")
    return [
        BenchmarkTask("flickr30k", examples, max_new_tokens=64, scorer=caption_scorer, read=read)
    ]
