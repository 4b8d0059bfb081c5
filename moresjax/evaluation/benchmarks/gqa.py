"""GQA (Hudson & Manning 2019): questions about the scene graphs of photos.

Files in `gqa/`, from https://cs.stanford.edu/people/dorarad/gqa/download.html:
`testdev_balanced_questions.json` or `val_balanced_questions.json` (of `questions1.2.zip`), and
`images/`. The predictions are also written for the benchmark's own `eval.py`.
"""

import json
from collections.abc import Mapping

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.vqa import gqa_accuracy, normalize_gqa
from moresjax.evaluation.scoring import by_item, percent_by
from moresjax.evaluation.tasks import VisualTask, benchmark

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
    data_root=None, limit: int | None = None, split: str = "testdev_balanced"
) -> list[VisualTask]:
    """Accuracy, also of binary and of open questions."""
    folder = folder_of("gqa", data_root)
    choose_split("gqa", split, list(SIZES))
    rows = list(read_json(folder, f"{split}_questions.json").items())
    items = [
        Item(
            name,
            ask(row["question"]),
            row["answer"],
            (folder / "images" / f"{row['imageId']}.jpg",),
            facts={"kind": "open" if row["types"]["structural"] == "query" else "binary"},
        )
        for name, row in first(rows, limit, f"gqa {split}", SIZES[split])
    ]
    score, read = by_item(gqa_accuracy, percent_by("kind")), read_rows("questionId", "prediction")
    submit = {"gqa-submission.json": _submission}
    return [VisualTask("gqa", items, score=score, read=read, submissions=submit)]
