"""MME (Fu et al. 2023): two yes/no questions per image, in fourteen subtasks.

Files in `mme/`, from https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation
(`MME_Benchmark_release_version/`): a folder per subtask with `NAME.txt` (question, tab, answer;
twice) beside the image `NAME.jpg` or `NAME.png`, or in `questions_answers_YN/` beside `images/`.
Saved predictions are a folder of `SUBTASK.txt` with image, question, answer, prediction: what the
benchmark's `calculation.py` reads, and what is written here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of
from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION, mme_answer, mme_summary
from moresjax.evaluation.scoring import Score
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZE = 2_374
YES_NO = "Please answer yes or no."


def _questions(folder: Path, subtask: str) -> list[Item]:
    root = folder / subtask
    if not root.is_dir():
        raise UserError(f"{root} does not exist; task mme reads all its subtasks")
    nested = (root / "questions_answers_YN").is_dir()
    texts = (root / "questions_answers_YN" if nested else root).glob("*.txt")
    photos = {path.stem: path for path in (root / "images" if nested else root).glob("*.[jp][pn]g")}
    items = []
    for path in sorted(texts):
        if path.stem not in photos:
            raise UserError(f"{path} has no image of the same name")
        image = photos[path.stem]
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                question, _, answer = line.partition("\t")
                prompt = ask(question.removesuffix(YES_NO).strip())
                row = (image.name, question, answer.strip())
                facts = {"subtask": subtask, "image": image.name, "row": row}
                name = f"{subtask}/{image.name}/{question}"
                items.append(Item(name, prompt, answer.strip().lower(), (image,), facts=facts))
    return items


def _score(items, predictions, judge=None) -> Score:
    texts = [text or "" for text in predictions]
    pairs = list(zip(items, texts, strict=True))
    details = mme_summary(
        (item.facts["subtask"], item.facts["image"], text, item.answer) for item, text in pairs
    )
    values = [float(mme_answer(text) == item.answer) for item, text in pairs]
    total = details["perception"] + details["cognition"]
    return Score("perception + cognition", values, details, total=total)


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


def _results(items: list[Item], subtask: str) -> Callable[[Mapping[str, str]], str]:
    rows = [(item.id, item.facts["row"]) for item in items if item.facts["subtask"] == subtask]

    def write(predictions: Mapping[str, str]) -> str:
        # A row is a line: an answer has no tabs and line ends.
        texts = [(*row, " ".join(predictions[name].split())) for name, row in rows]
        return "".join("\t".join(fields) + "\n" for fields in texts)

    return write


@benchmark("mme")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """Sum of accuracy and pair accuracy over the subtasks, at most 2800 points."""
    folder = folder_of("mme", data_root)
    choose_split("mme", split, ("test",))
    items = [item for subtask in PERCEPTION + COGNITION for item in _questions(folder, subtask)]
    # Both questions of an image count together.
    limit = None if limit is None else limit + limit % 2
    items = first(items, limit, "mme", SIZE)
    subtasks = dict.fromkeys(item.facts["subtask"] for item in items)
    results = {f"mme-submission/{name}.txt": _results(items, name) for name in subtasks}
    return [VisualTask("mme", items, score=_score, read=_read, submissions=results)]
