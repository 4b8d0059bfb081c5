"""MMHal-Bench (Sun et al. 2023): open questions that invite hallucinations, rated by an LLM.

Files in `mmhal/`, from https://huggingface.co/datasets/Shengcao1006/MMHal-Bench:
`response_template.json` and `images/` (named as the end of `image_src`). The predictions are also
written into the template, for the benchmark's own evaluator.
"""

import json
from collections.abc import Mapping

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.judged import MMHAL_MAX, mmhal_summary, parse_mmhal
from moresjax.evaluation.scoring import judged
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 96


def _details(items, predictions, marks) -> dict[str, float]:
    kinds = [item.facts["question_type"] for item in items]
    return mmhal_summary([int(mark) for mark in marks], kinds)


@benchmark("mmhal")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Mean rating as a share of the best one; without a judge there is no score."""
    folder = folder_of("mmhal", data_root)
    choose_split("mmhal", split, ("test",))
    rows = first(read_json(folder, "response_template.json"), limit, "mmhal", SIZE)
    items = [
        Item(
            str(number),
            ask(row["question"], ""),
            row["gt_answer"],
            (folder / "images" / row["image_src"].rpartition("/")[2],),
            facts={
                "question_type": row["question_type"],
                "image_content": ", ".join(row["image_content"]),
            },
        )
        for number, row in enumerate(rows)
    ]

    def submission(predictions: Mapping[str, str]) -> str:
        filled = [
            row | {"model_answer": predictions[item.id]}
            for row, item in zip(rows, items, strict=True)
        ]
        return json.dumps(filled, indent=1)

    score = judged(
        "mmhal",
        parse_mmhal,
        fields=lambda item: {"image_content": item.facts["image_content"]},
        values=lambda items, marks: [mark / MMHAL_MAX for mark in marks],
        details=_details,
        name="rating",
    )
    return [
        VisualTask(
            "mmhal",
            items,
            max_new_tokens=512,
            score=score,
            read=read_rows(None, "model_answer"),
            submissions={"mmhal-responses.json": submission},
        )
    ]
