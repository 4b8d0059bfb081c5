"""MM-Vet (Yu et al. 2023): open questions that need several skills, graded by an LLM.

Files in `mm_vet/`, from https://github.com/yuweihao/MM-Vet (`mm-vet.zip`): `mm-vet.json` and
`images/`. The predictions are also written in the format of the benchmark's own evaluator.
"""

import json

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.judge_prompts import MM_VET_ATTEMPTS, MM_VET_RETRY
from moresjax.evaluation.metrics.judged import (
    mm_vet_answer,
    mm_vet_summary,
    parse_mm_vet,
    rule_mm_vet,
)
from moresjax.evaluation.scoring import judged
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 218


def _details(items, predictions, marks) -> dict[str, float]:
    runs = {item.id: [mark] for item, mark in zip(items, marks, strict=True)}
    return mm_vet_summary(runs, {item.id: item.facts["capability"] for item in items})


@benchmark("mm_vet")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Mean grade, also per skill; without a judge a rule counts the parts of the answer."""
    folder = folder_of("mm_vet", data_root)
    choose_split("mm_vet", split, ("test",))
    rows = list(read_json(folder, "mm-vet.json").items())
    items = [
        Item(
            name,
            ask(row["question"], ""),
            row["answer"],
            (folder / "images" / row["imagename"],),
            facts={"capability": row["capability"]},
        )
        for name, row in first(rows, limit, "mm_vet", SIZE, sure=False)
    ]
    score = judged(
        "mm_vet",
        parse_mm_vet,
        rule=rule_mm_vet,
        fields=lambda item: {"answer": mm_vet_answer(item.answer)},
        details=_details,
        name="grade",
        attempts=MM_VET_ATTEMPTS,
        retry=MM_VET_RETRY,
    )
    return [
        VisualTask(
            "mm_vet",
            items,
            max_new_tokens=1024,
            score=score,
            read=read_rows("question_id", "text"),
            submissions={"mm_vet-submission.json": json.dumps},
        )
    ]
