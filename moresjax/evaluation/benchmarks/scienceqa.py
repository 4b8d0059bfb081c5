"""ScienceQA (Lu et al. 2022): multiple-choice science questions, half of them with an image.

Files in `scienceqa/`, from https://scienceqa.github.io: `problems.json`, `pid_splits.json`, and
images as `test/ID/image.png` and `val/ID/image.png`.

`scienceqa` asks everything and `scienceqa_img` the questions with an image, both as LLaVA-1.5 does;
`scienceqa_img_ft` asks the latter in the words of the data that LLaVA Steering fine-tunes on.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    LETTERS,
    PICK_LETTER,
    DataRoot,
    benchmark_folder,
    check_split,
    choice_reader,
    example_from_record,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
    with_options,
)
from moresjax.evaluation.metrics.choices import scienceqa_letter, scienceqa_summary
from moresjax.evaluation.scoring import example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark
from moresjax.evaluation.training_files import Record, llava_record, training_records

SIZES = {"test": 4_241, "val": 4_241, "minitest": 424, "minival": 424}
WITH_IMAGE = 2_017  # of test
MAX_NEW_TOKENS = 1024


@training_records("scienceqa")
def records(root: Path, split: str, rng: random.Random) -> Iterator[Record]:
    """Questions with an image, answered by the letter of an option."""
    problems = read_json(root, "problems.json")
    for number in read_json(root, "pid_splits.json").get(split, ()):
        problem = problems[number]
        if not problem["image"]:  # half of the questions are text alone
            continue
        pairs = zip(LETTERS, problem["choices"], strict=False)
        options = ", ".join(f"{letter}.{choice}" for letter, choice in pairs)
        image = f"{problem['split']}/{number}/{problem['image']}"
        question = f"{problem['question']} {options}"
        yield llava_record(number, image, question, LETTERS[problem["answer"]])


def _task(name: str, examples: list[Example]) -> list[BenchmarkTask]:
    # A letter beyond a question's choices is never its answer.
    scorer = example_scorer(
        lambda text, answer: float(scienceqa_letter(text) == answer),
        lambda examples, texts, scores: scienceqa_summary(
            [example.metadata for example in examples], [bool(score) for score in scores]
        ),
    )
    # The authors' tool and LLaVA's save numbers of choices; -1 stands for a reply without one.
    read = choice_reader(
        result_reader("question_id", "text"),
        lambda _, number: LETTERS[number] if 0 <= number < len(LETTERS) else "",
    )
    return [BenchmarkTask(name, examples, max_new_tokens=MAX_NEW_TOKENS, scorer=scorer, read=read)]


def _example(folder: Path, name: str, problem: dict) -> Example:
    question = with_options(problem["question"], problem["choices"])
    if problem["hint"]:
        question = f"Context: {problem['hint']}\n{question}"
    # Smaller splits, like minitest, are parts of the large ones and have no images of their own.
    image = problem["image"]
    images = (image_file(folder, f"{problem['split']}/{name}/{image}", name),) if image else ()
    prompt = llava_prompt(question, PICK_LETTER, len(images))
    return Example(name, prompt, LETTERS[problem["answer"]], images, metadata=problem)


def _read(data_root: DataRoot, name: str, split: str) -> tuple[Path, dict[str, dict], list[str]]:
    """Folder, problems by id, and the ids of the split."""
    folder = benchmark_folder("scienceqa", data_root)
    check_split(name, split, list(SIZES))
    problems = read_json(folder, "problems.json")
    return folder, problems, read_json(folder, "pid_splits.json")[split]


@benchmark("scienceqa")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, also by subject, context and grade."""
    folder, problems, names = _read(data_root, "scienceqa", split)
    names = limit_rows(names, limit, f"scienceqa {split}", SIZES[split])
    return _task("scienceqa", [_example(folder, n, problems[n]) for n in names])


@benchmark("scienceqa_img")
def load_img(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy over the questions with an image."""
    folder, problems, names = _read(data_root, "scienceqa_img", split)
    shown = [name for name in names if problems[name]["image"]]
    size = WITH_IMAGE if split == "test" else None
    shown = limit_rows(shown, limit, f"scienceqa_img {split}", size, strict=False)
    return _task("scienceqa_img", [_example(folder, n, problems[n]) for n in shown])


@benchmark("scienceqa_img_ft")
def load_ft(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """The same after task-specific fine-tuning."""
    folder, problems, _ = _read(data_root, "scienceqa_img_ft", split)
    size = WITH_IMAGE if split == "test" else None
    rows = list(records(folder, split, random.Random()))
    rows = limit_rows(rows, limit, f"scienceqa_img_ft {split}", size, strict=False)
    examples = [example_from_record(row, folder, problems[row["id"]]) for row in rows]
    return _task("scienceqa_img_ft", examples)
