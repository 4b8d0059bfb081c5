"""GQA (Hudson & Manning 2019): questions about the scene graphs of photos.

Files in `gqa/`, from https://cs.stanford.edu/people/dorarad/gqa/download.html:
`testdev_balanced_questions.json` or `val_balanced_questions.json` (of `questions1.2.zip`), and
`images/`. The predictions are also written for the benchmark's own `eval.py`.
"""

import json
from collections.abc import Mapping

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import gqa_accuracy, normalize_gqa
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZES = {"testdev_balanced": 12_578, "val_balanced": 132_062}


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps(
        [
            {"questionId": name, "prediction": normalize_gqa(text)}
            for name, text in predictions.items()
        ]
    )


@benchmark("gqa")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "testdev_balanced"
) -> list[BenchmarkTask]:
    """Accuracy, also of binary and of open questions."""
    folder = benchmark_folder("gqa", data_root)
    check_split("gqa", split, list(SIZES))
    rows = list(read_json(folder, f"{split}_questions.json").items())
    examples = [
        Example(
            name,
            llava_prompt(row["question"]),
            row["answer"],
            (image_file(folder / "images", f"{row['imageId']}.jpg", name),),
            metadata={"kind": "open" if row["types"]["structural"] == "query" else "binary"},
        )
        for name, row in limit_rows(rows, limit, f"gqa {split}", SIZES[split])
    ]
    scorer = example_scorer(gqa_accuracy, percent_by("kind"))
    read = result_reader("questionId", "prediction")
    submissions = {"gqa-submission.json": _submission}
    return [BenchmarkTask("gqa", examples, scorer=scorer, read=read, submissions=submissions)]
