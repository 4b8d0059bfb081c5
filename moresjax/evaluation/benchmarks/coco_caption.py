"""COCO captions (Chen et al. 2015) on the splits of Karpathy & Fei-Fei 2015.

Files in `coco_caption/`: `dataset_coco.json` (of
https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip). Photos in
`coco/val2014/`. Prompt and length limit are those of xl-vlms.
"""

from pathlib import Path

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import CAPTION, ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.scoring import captions
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"test": 5_000, "val": 5_000}


@benchmark("coco_caption")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """CIDEr-D, BLEU and ROUGE-L."""
    folder = folder_of("coco_caption", data_root)
    choose_split("coco_caption", split, list(SIZES))
    rows = [
        row for row in read_json(folder, "dataset_coco.json")["images"] if row["split"] == split
    ]
    items = [
        Item(
            str(row["cocoid"]),
            ask(CAPTION, ""),
            [sentence["raw"] for sentence in row["sentences"]],
            (Path(data_root) / "coco" / row["filepath"] / row["filename"],),
        )
        for row in first(rows, limit, f"coco_caption {split}", SIZES[split])
    ]
    read = read_rows("image_id", "caption")
    return [VisualTask("coco_caption", items, max_new_tokens=25, score=captions, read=read)]
