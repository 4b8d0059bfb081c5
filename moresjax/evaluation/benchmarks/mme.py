"""MME (Fu et al. 2023): two yes/no questions per image, in fourteen subtasks.

Files in `mme/`, from https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation
(`MME_Benchmark_release_version/`): a folder per subtask with `NAME.txt` (question, tab, answer;
twice) beside the image `NAME.jpg` or `NAME.png`, or in `questions_answers_YN/` beside `images/`.
Saved predictions are a folder of `SUBTASK.txt` with image, question, answer, prediction: what the
benchmark's `calculation.py` reads, and what is written here.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    limit_rows,
    llava_prompt,
)
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION, mme_answer, mme_summary
from moresjax.evaluation.scoring import Predictions, TaskScore
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 2_374
YES_NO = "Please answer yes or no."


def _questions(folder: Path, subtask: str) -> list[Example]:
    root = folder / subtask
    if not root.is_dir():
        raise UserError(f"{root} does not exist; task mme reads all its subtasks")
    nested = (root / "questions_answers_YN").is_dir()
    texts = (root / "questions_answers_YN" if nested else root).glob("*.txt")
    photos = {path.stem: path for path in (root / "images" if nested else root).glob("*.[jp][pn]g")}
    examples = []
    for path in sorted(texts):
        if path.stem not in photos:
            raise UserError(f"{path} has no image of the same name")
        image = photos[path.stem]
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                question, _, answer = line.partition("\t")
                prompt = llava_prompt(question.removesuffix(YES_NO).strip())
                row = (image.name, question, answer.strip())
                metadata = {"subtask": subtask, "image": image.name, "row": row}
                name = f"{subtask}/{image.name}/{question}"
                examples.append(
                    Example(name, prompt, answer.strip().lower(), (image,), metadata=metadata)
                )
    return examples


def _scorer(
    examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
) -> TaskScore:
    texts = [text or "" for text in predictions]
    pairs = list(zip(examples, texts, strict=True))
    details = mme_summary(
        (example.metadata["subtask"], example.metadata["image"], text, example.answer)
        for example, text in pairs
    )
    values = [float(mme_answer(text) == example.answer) for example, text in pairs]
    total = details["perception"] + details["cognition"]
    return TaskScore("perception + cognition", values, details, total=total)


def _read(path: Path) -> dict[str, str]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder of MME results")
    found = {}
    for file in sorted(path.glob("*.txt")):
        name = None
        for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            fields = line.split("\t", 3)
            if len(fields) == 4:
                image, question, _, prediction = fields
                name = f"{file.stem}/{image}/{question}"
                found[name] = prediction
            elif len(fields) == 1 and name is not None:  # a prediction of several lines goes on
                found[name] += f"\n{line}"
            elif line:
                raise UserError(f"line {number} of {file} has {len(fields)} columns instead of 4")
    return found


def _results(examples: list[Example], subtask: str) -> Callable[[Mapping[str, str]], str]:
    rows = [
        (example.id, example.metadata["row"])
        for example in examples
        if example.metadata["subtask"] == subtask
    ]

    def write(predictions: Mapping[str, str]) -> str:
        # A row is a line: an answer has no tabs and line ends. Each becomes one blank, because the
        # benchmark's tool counts characters.
        texts = [(*row, re.sub(r"\s", " ", predictions[name])) for name, row in rows]
        return "".join("\t".join(fields) + "\n" for fields in texts)

    return write


def _task(name: str, data_root: DataRoot, limit: int | None, split: str) -> BenchmarkTask:
    folder = benchmark_folder("mme", data_root)
    check_split(name, split, ("test",))
    examples = [
        example for subtask in PERCEPTION + COGNITION for example in _questions(folder, subtask)
    ]
    # Both questions of an image count together.
    limit = None if limit is None else limit + limit % 2
    examples = limit_rows(examples, limit, name, SIZE)
    subtasks = dict.fromkeys(example.metadata["subtask"] for example in examples)
    results = {f"{name}-submission/{part}.txt": _results(examples, part) for part in subtasks}
    return BenchmarkTask(name, examples, scorer=_scorer, read=_read, submissions=results)


@benchmark("mme")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Sum of accuracy and pair accuracy over the subtasks, at most 2800 points."""
    return [_task("mme", data_root, limit, split)]


@benchmark("mme_sampled")
def load_sampled(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """The same with answers of at most 8 tokens that are drawn, as MRT's code draws them."""
    task = _task("mme_sampled", data_root, limit, split)
    return [dataclasses.replace(task, temperature=0.4, max_new_tokens=8)]
