"""HallusionBench (Guan et al. 2024): yes/no questions about figures, some of them altered.

Files in `hallusionbench/`, from https://github.com/tianyi-lab/HallusionBench: `HallusionBench.json`
and `hallusion_bench/` (of `hallusion_bench.zip`). The predictions are also written into the rows of
the former, for the benchmark's own `evaluation.py`.
"""

import json
from collections.abc import Mapping

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.hallusionbench import (
    hallusionbench_summary,
    is_correct,
    parse_verdict,
    rule_verdict,
)
from moresjax.evaluation.scoring import judged
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 1_129
NO_FIGURE = "0"


def _item(folder, number: int, row: dict) -> Item:
    shown = str(row["visual_input"]) != NO_FIGURE
    images = (folder / row["filename"],) if shown else ()
    prompt = ask(row["question"], "", len(images))
    return Item(str(number), prompt, str(row["gt_answer"]), images, facts=row)


@benchmark("hallusionbench")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy per question, figure and pair; without a judge a `yes` anywhere means yes."""
    folder = folder_of("hallusionbench", data_root)
    choose_split("hallusionbench", split, ("test",))
    rows = first(read_json(folder, "HallusionBench.json"), limit, "hallusionbench", SIZE)
    items = [_item(folder, number, row) for number, row in enumerate(rows)]

    def submission(predictions: Mapping[str, str]) -> str:
        filled = [dict(item.facts, model_prediction=predictions[item.id]) for item in items]
        return json.dumps(filled, indent=1)

    score = judged(
        "hallusionbench",
        parse_verdict,
        rule=rule_verdict,
        fields=lambda item: {"answer": item.facts["gt_answer_details"]},
        values=lambda items, marks: [
            float(is_correct(item.facts, int(mark)))
            for item, mark in zip(items, marks, strict=True)
        ],
        details=lambda items, texts, marks: hallusionbench_summary(
            [item.facts for item in items], [int(mark) for mark in marks]
        ),
        name="aAcc",
    )
    read = read_rows(None, "model_prediction")
    return [
        VisualTask(
            "hallusionbench",
            items,
            max_new_tokens=512,
            score=score,
            read=read,
            submissions={"hallusionbench-submission.json": submission},
        )
    ]
