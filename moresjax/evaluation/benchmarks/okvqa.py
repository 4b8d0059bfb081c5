"""OK-VQA (Marino et al. 2019): questions about COCO photos that need outside knowledge.

Files in `okvqa/`, from https://okvqa.allenai.org/download.html:
`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`.
Photos in `coco/val2014/`.
"""

from pathlib import Path

from moresjax.data.generators import coco_questions
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    coco_image,
    limit_rows,
    llava_prompt,
    result_reader,
)
from moresjax.evaluation.metrics.vqa import vqa_accuracy
from moresjax.evaluation.scoring import example_scorer, percent_by
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 5_046


def vqa_examples(prefix: str, folder: Path, data_root: DataRoot) -> list[Example]:
    """All questions of val2014 in the VQA format; `prefix` is that of the files' version."""
    return [
        Example(
            str(question["question_id"]),
            llava_prompt(question["question"]),
            [answer["answer"] for answer in annotation["answers"]],
            (coco_image(data_root, "val2014", question["image_id"]),),
            metadata={
                "answer_type": annotation["answer_type"],
                "question_type": annotation["question_type"],
            },
        )
        for question, annotation, _ in coco_questions(folder, "val", prefix)
    ]


@benchmark("okvqa")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "val"
) -> list[BenchmarkTask]:
    """VQA accuracy on `val`."""
    folder = benchmark_folder("okvqa", data_root)
    check_split("okvqa", split, ("val",))
    examples = limit_rows(vqa_examples("", folder, data_root), limit, "okvqa val", SIZE)
    scorer = example_scorer(vqa_accuracy, percent_by("question_type"), "VQA accuracy")
    return [
        BenchmarkTask("okvqa", examples, scorer=scorer, read=result_reader("question_id", "answer"))
    ]
