"""POPE (Li et al. 2023): is an object in the photo? Three ways to choose objects that are not.

Files in `pope/`, from https://github.com/RUCAIBox/POPE (`output/coco/`): `coco_pope_random.json`,
`coco_pope_popular.json`, `coco_pope_adversarial.json`. Photos in `coco/val2014/`.
"""

from collections.abc import Sequence

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
from moresjax.evaluation.metrics.yes_no import pope_answer, pope_summary
from moresjax.evaluation.scoring import Predictions, Scorer, example_scorer, same_answer_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

KINDS = ("random", "popular", "adversarial")
SIZE = 3_000  # an earlier version of `random`, which LLaVA uses, has 2,910


def is_right(text: str, label: str) -> float:
    """Whether an answer reads as the label, as a score."""
    return float(pope_answer(text) == label)


def details(
    examples: Sequence[Example], predictions: Predictions, scores: Sequence[float]
) -> dict[str, float]:
    """POPE's numbers beside accuracy."""
    # No answer reads as yes here, but it must not be right.
    texts = [
        {"yes": "no", "no": "yes"}[example.answer] if text is None else text
        for example, text in zip(examples, predictions, strict=True)
    ]
    return pope_summary(texts, [example.answer for example in examples])


def _tasks(
    name: str, data_root: DataRoot, limit: int | None, split: str, scorer: Scorer
) -> list[BenchmarkTask]:
    folder = benchmark_folder("pope", data_root)
    check_split(name, split, ("test",))
    photos = folder.parent / "coco" / "val2014"
    tasks = []
    for kind in KINDS:
        rows = read_jsonl(folder, f"coco_pope_{kind}.json")
        examples = [
            Example(
                str(row["question_id"]),
                llava_prompt(row["text"]),
                row["label"],
                (image_file(photos, row["image"], row["question_id"]),),
            )
            for row in limit_rows(rows, limit, f"{name} {kind}", SIZE, strict=kind != "random")
        ]
        # The official answers have no ids: their order is that of the questions.
        read = result_reader(None, "answer")
        tasks.append(BenchmarkTask(f"{name}_{kind}", examples, scorer=scorer, read=read))
    return tasks


@benchmark("pope")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, precision, recall and F1 of each kind."""
    scorer = example_scorer(is_right, details)
    return _tasks("pope", data_root, limit, split, scorer)


@benchmark("pope_judged")
def load_judged(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Share of answers that a judge finds right, of each kind."""
    scorer = same_answer_scorer(is_right)
    return _tasks("pope_judged", data_root, limit, split, scorer)
