"""TextCaps (Sidorov et al. 2020): captions that mention the text in a photo.

Files in `textcaps/`, from https://textvqa.org/textcaps/dataset/: `TextCaps_0.1_val.json`,
`TextVQA_Rosetta_OCR_v0.2_val.json`, and `train_images/` (which holds the photos of val too); for
the server the two files of `test` and `test_images/`.
"""

import json
from collections.abc import Mapping

from moresjax.data.generators import read_json
from moresjax.evaluation.benchmarks.textvqa import ocr_lines
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    CAPTION,
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    llava_prompt,
    result_reader,
)
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SPLITS = ("val", "test")


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
            (photos / f"{name}.jpg",),
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
