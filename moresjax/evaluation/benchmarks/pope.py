"""POPE (Li et al. 2023): is an object in the photo? Three ways to choose objects that are not.

Files in `pope/`, from https://github.com/RUCAIBox/POPE (`output/coco/`): `coco_pope_random.json`,
`coco_pope_popular.json`, `coco_pope_adversarial.json`. Photos in `coco/val2014/`.
"""

from pathlib import Path

from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import (
    ask,
    choose_split,
    first,
    folder_of,
    read_lines,
    read_rows,
)
from moresjax.evaluation.metrics.yes_no import pope_answer, pope_summary
from moresjax.evaluation.scoring import by_item
from moresjax.evaluation.tasks import VisualTask, benchmark

KINDS = ("random", "popular", "adversarial")
SIZE = 3_000  # an earlier version of `random`, which LLaVA uses, has 2,910


def _details(items, predictions, values) -> dict[str, float]:
    # No answer reads as yes here, but it must not be right.
    texts = [
        {"yes": "no", "no": "yes"}[item.answer] if text is None else text
        for item, text in zip(items, predictions, strict=True)
    ]
    return pope_summary(texts, [item.answer for item in items])


@benchmark("pope")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Accuracy, precision, recall and F1 of each kind."""
    folder = folder_of("pope", data_root)
    choose_split("pope", split, ("test",))
    score = by_item(lambda text, label: float(pope_answer(text) == label), _details)
    tasks = []
    for kind in KINDS:
        rows = read_lines(folder, f"coco_pope_{kind}.json")
        items = [
            Item(
                str(row["question_id"]),
                ask(row["text"]),
                row["label"],
                (Path(data_root) / "coco" / "val2014" / row["image"],),
            )
            for row in first(rows, limit, f"pope {kind}", SIZE, sure=kind != "random")
        ]
        # The official answers have no ids: their order is that of the questions.
        read = read_rows(None, "answer")
        tasks.append(VisualTask(f"pope_{kind}", items, score=score, read=read))
    return tasks
