"""OK-VQA (Marino et al. 2019): questions about COCO photos that need outside knowledge.

Files in `okvqa/`, from https://okvqa.allenai.org/download.html:
`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`.
Photos in `coco/val2014/`.
"""

from pathlib import Path

from moresjax.data.generators import coco_questions
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, coco_image, first, folder_of, read_rows
from moresjax.evaluation.metrics.vqa import vqa_accuracy
from moresjax.evaluation.scoring import by_item, percent_by
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 5_046


def vqa_items(prefix: str, folder: Path, data_root) -> list[Item]:
    """All questions of val2014 in the VQA format; `prefix` is that of the files' version."""
    return [
        Item(
            str(question["question_id"]),
            ask(question["question"]),
            [answer["answer"] for answer in annotation["answers"]],
            (coco_image(data_root, "val2014", question["image_id"]),),
            facts={
                "answer_type": annotation["answer_type"],
                "question_type": annotation["question_type"],
            },
        )
        for question, annotation, _ in coco_questions(folder, "val", prefix)
    ]


@benchmark("okvqa")
def load(data_root=None, limit: int | None = None, split: str = "val") -> list[VisualTask]:
    """VQA accuracy on `val`."""
    folder = folder_of("okvqa", data_root)
    choose_split("okvqa", split, ("val",))
    items = first(vqa_items("", folder, data_root), limit, "okvqa val", SIZE)
    score = by_item(vqa_accuracy, percent_by("question_type"), "VQA accuracy")
    return [VisualTask("okvqa", items, score=score, read=read_rows("question_id", "answer"))]
