"""TextCaps (Sidorov et al. 2020): captions that mention the text in a photo.

Files in `textcaps/`, from https://textvqa.org/textcaps/dataset/: `TextCaps_0.1_val.json`,
`TextVQA_Rosetta_OCR_v0.2_val.json`, and `train_images/` (which holds the photos of val too); for
the server the two files of `test` and `test_images/`.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from moresjax.evaluation.benchmarks.textvqa import ocr_lines
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    CAPTION,
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SPLITS = ("val", "test")


@training_records("textcaps")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """One sample per photo, with one of its captions."""
    found = read_json(root, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
    words = {item["image_id"]: item["ocr_tokens"] for item in found}
    photos = {}
    for item in read_json(root, f"TextCaps_0.1_{split}.json")["data"]:
        photos.setdefault(item["image_id"], item["reference_strs"])
    folder = "test_images" if split == "test" else "train_images"
    for photo, captions in photos.items():
        request = f"{CAPTION}\nReference OCR token: {', '.join(words.get(photo, ()))}"
        yield llava_record(photo, f"{folder}/{photo}.jpg", request, rng.choice(captions))


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps([{"image_id": i, "caption": text} for i, text in predictions.items()])


@benchmark("textcaps")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """CIDEr-D, BLEU and ROUGE-L on `val`; `test` makes the file for the EvalAI server."""
    folder = benchmark_folder("textcaps", data_root)
    check_split("textcaps", split, SPLITS)
    # There is a row per caption, and every row has all captions of its photo.
    rows = {row["image_id"]: row for row in read_json(folder, f"TextCaps_0.1_{split}.json")["data"]}
    lines = ocr_lines(folder, split)
    photos = folder / ("test_images" if split == "test" else "train_images")
    examples = [
        Example(
            name,
            llava_prompt(f"{CAPTION}\n{lines.get(name, 'Reference OCR token: ')}", ""),
            row["reference_strs"] if split == "val" else None,
            (image_file(photos, f"{name}.jpg", name),),
        )
        for name, row in limit_rows(list(rows.items()), limit, f"textcaps {split}")
    ]
    read = result_reader("image_id", "caption")
    submissions = {"textcaps-submission.json": _submission} if split == "test" else {}
    return [
        BenchmarkTask(
            "textcaps",
            examples,
            max_new_tokens=1024,
            scorer=caption_scorer,
            read=read,
            submissions=submissions,
        )
    ]
