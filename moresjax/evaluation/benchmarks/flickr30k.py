"""Flickr30k captions (Young et al. 2014) on Karpathy's splits.

Files in `flickr30k/`, from https://huggingface.co/datasets/nlphuji/flickr30k:
`flickr_annotations_30k.csv` and `flickr30k-images/`.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    CAPTION,
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    require_file,
    result_reader,
)
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SIZES = {"test": 1_000, "val": None}
FILE = "flickr_annotations_30k.csv"
# How training records ask for a caption; the wording is ours.
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


@training_records("flickr30k")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """One of five captions per photo, asked for in one of nine ways."""
    for row in _rows(root, split):
        caption = rng.choice(json.loads(row["raw"]))
        image = f"flickr30k-images/{row['filename']}"
        yield llava_record(row["img_id"], image, rng.choice(REQUESTS), caption)


def _rows(folder: Path, split: str) -> Iterator[dict[str, str]]:
    with require_file(folder / FILE).open(newline="", encoding="utf-8") as file:
        yield from (row for row in csv.DictReader(file) if row["split"] == split)


@benchmark("flickr30k")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """CIDEr-D, BLEU and ROUGE-L."""
    folder = benchmark_folder("flickr30k", data_root)
    check_split("flickr30k", split, list(SIZES))
    rows = list(_rows(folder, split))
    examples = [
        Example(
            row["img_id"],
            llava_prompt(CAPTION, ""),
            json.loads(row["raw"]),
            (image_file(folder / "flickr30k-images", row["filename"], row["img_id"]),),
        )
        for row in limit_rows(rows, limit, f"flickr30k {split}", SIZES[split])
    ]
    read = result_reader("image_id", "caption")
    return [
        BenchmarkTask("flickr30k", examples, max_new_tokens=64, scorer=caption_scorer, read=read)
    ]
