"""SNLI-VE (Xie et al. 2019): does a photo entail a sentence?

Files in `snli_ve/`, made as https://github.com/necla-ml/SNLI-VE describes: `snli_ve_test.jsonl`
(`snli_ve_dev.jsonl`). Photos in `flickr30k/flickr30k-images/`. MRT's prompt is not published;
this one names the three labels.
"""

from pathlib import Path

from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import (
    SHORT,
    ask,
    choose_split,
    first,
    folder_of,
    read_lines,
    read_rows,
)
from moresjax.evaluation.scoring import one_label
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"test": 17_901, "dev": None}
LABELS = ("entailment", "neutral", "contradiction")
QUESTION = "Is its relation to the image entailment, neutral or contradiction?"


@benchmark("snli_ve")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy, by MRT's judge or by the label that is named."""
    folder = folder_of("snli_ve", data_root)
    choose_split("snli_ve", split, list(SIZES))
    rows = read_lines(folder, f"snli_ve_{split}.jsonl")
    # Pairs without a majority among the annotators have no label.
    rows = [row for row in rows if row["gold_label"] in LABELS]
    photos = Path(data_root) / "flickr30k" / "flickr30k-images"
    items = [
        Item(
            row["pairID"],
            ask(f"Statement: {row['sentence2']}\n{QUESTION}", SHORT),
            row["gold_label"],
            (photos / f"{row['Flickr30K_ID']}.jpg",),
        )
        for row in first(rows, limit, f"snli_ve {split}", SIZES[split])
    ]
    read = read_rows("pairID", "prediction")
    return [VisualTask("snli_ve", items, score=one_label(LABELS), read=read)]
