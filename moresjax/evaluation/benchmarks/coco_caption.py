"""COCO captions (Chen et al. 2015) on the splits of Karpathy & Fei-Fei 2015.

Files in `coco_caption/`: `dataset_coco.json` (of
https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip). Photos in
`coco/val2014/`, those of the split `train` (with `restval`) also in `coco/train2014/`. Prompt and
length limit are those of xl-vlms.
"""

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

SIZES = {"test": 5_000, "val": 5_000, "train": 113_287}


@benchmark("coco_caption")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """CIDEr-D, BLEU and ROUGE-L."""
    folder = benchmark_folder("coco_caption", data_root)
    check_split("coco_caption", split, list(SIZES))
    parts = ("train", "restval") if split == "train" else (split,)
    rows = [
        row for row in read_json(folder, "dataset_coco.json")["images"] if row["split"] in parts
    ]
    coco = folder.parent / "coco"
    examples = [
        Example(
            str(row["cocoid"]),
            llava_prompt(CAPTION, ""),
            [sentence["raw"] for sentence in row["sentences"]],
            (image_file(coco, f"{row['filepath']}/{row['filename']}", row["cocoid"]),),
        )
        for row in limit_rows(rows, limit, f"coco_caption {split}", SIZES[split])
    ]
    read = result_reader("image_id", "caption")
    return [
        BenchmarkTask("coco_caption", examples, max_new_tokens=25, scorer=caption_scorer, read=read)
    ]
