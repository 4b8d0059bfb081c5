"""SNLI-VE (Xie et al. 2019): does a photo entail a sentence?

Files in `snli_ve/`, made as https://github.com/necla-ml/SNLI-VE describes: `snli_ve_test.jsonl`
(`snli_ve_dev.jsonl`). Photos in `flickr30k/flickr30k-images/`. MRT's prompt is not published;
this one names the three labels.
"""

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    SHORT,
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

SIZES = {"test": 17_901, "dev": None}
LABELS = ("entailment", "neutral", "contradiction")
QUESTION = "Is its relation to the image entailment, neutral or contradiction?"


@benchmark("snli_ve")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, by MRT's judge or by the label that is named."""
    folder = benchmark_folder("snli_ve", data_root)
    check_split("snli_ve", split, list(SIZES))
    rows = read_jsonl(folder, f"snli_ve_{split}.jsonl")
    # Pairs without a majority among the annotators have no label.
    rows = [row for row in rows if row["gold_label"] in LABELS]
    photos = folder.parent / "flickr30k" / "flickr30k-images"
    examples = [
        Example(
            row["pairID"],
            llava_prompt(f"Statement: {row['sentence2']}\n{QUESTION}", SHORT),
            row["gold_label"],
            (image_file(photos, f"{row['Flickr30K_ID']}.jpg", row["pairID"]),),
        )
        for row in limit_rows(rows, limit, f"snli_ve {split}", SIZES[split])
    ]
    read = result_reader("pairID", "prediction")
    return [BenchmarkTask("snli_ve", examples, scorer=label_scorer(LABELS), read=read)]
