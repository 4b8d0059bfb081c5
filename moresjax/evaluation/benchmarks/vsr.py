"""Visual Spatial Reasoning (Liu et al. 2023): does a sentence about where things are hold?

Files in `vsr/`, from https://github.com/cambridgeltl/visual-spatial-reasoning:
`data/splits/zeroshot/test.jsonl` (and `random`, `train`, `dev`), and the photos in `images/`.
"""

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_jsonl,
    result_reader,
)
from moresjax.evaluation.scoring import label_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

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
    data_root: DataRoot = None, limit: int | None = None, split: str = "zeroshot_test"
) -> list[BenchmarkTask]:
    """Accuracy, by MRT's judge or by the word yes or no."""
    folder = benchmark_folder("vsr", data_root)
    kind, _, part = check_split("vsr", split, list(SIZES)).partition("_")
    rows = read_jsonl(folder, f"data/splits/{kind}/{part}.jsonl")
    examples = [
        Example(
            str(number),
            llava_prompt(f"{row['caption']} {YES_NO}", ""),
            LABELS[row["label"]],
            (image_file(folder / "images", row["image"], number),),
        )
        for number, row in enumerate(limit_rows(rows, limit, f"vsr {split}", SIZES[split]))
    ]
    read = result_reader(None, "prediction")
    return [BenchmarkTask("vsr", examples, scorer=label_scorer(LABELS), read=read)]
