"""Visual Spatial Reasoning (Liu et al. 2023): does a sentence about where things are hold?

Files in `vsr/`, from https://github.com/cambridgeltl/visual-spatial-reasoning:
`data/splits/zeroshot/test.jsonl` (and `random`, `train`, `dev`), and the photos in `images/`.
"""

from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_lines, read_rows
from moresjax.evaluation.scoring import one_label
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {
    "zeroshot_test": 1_222,
    "zeroshot_dev": 340,
    "random_test": 2_195,
    "random_dev": 1_097,
}
LABELS = ("no", "yes")
YES_NO = "Please answer yes or no."


@benchmark("vsr")
def load(
    data_root=None, limit: int | None = None, split: str = "zeroshot_test"
) -> list[VisualTask]:
    """Accuracy, by MRT's judge or by the word yes or no."""
    folder = folder_of("vsr", data_root)
    kind, _, part = choose_split("vsr", split, list(SIZES)).partition("_")
    rows = read_lines(folder, f"data/splits/{kind}/{part}.jsonl")
    items = [
        Item(
            str(number),
            ask(f"{row['caption']} {YES_NO}", ""),
            LABELS[row["label"]],
            (folder / "images" / row["image"],),
        )
        for number, row in enumerate(first(rows, limit, f"vsr {split}", SIZES[split]))
    ]
    read = read_rows(None, "prediction")
    return [VisualTask("vsr", items, score=one_label(LABELS), read=read)]
