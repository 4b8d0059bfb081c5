"""The paper's task files: official downloads turned into LLaVA's conversation format.

A generator is a function `records(root, split, rng)`, registered by `@register_task(name)` in a
file of `moresjax.data.tasks` or in a plug-in. It reads the annotations below `root` as their authors
publish them and yields LLaVA records whose image paths start from `root`. Prompts are those of
LLaVA-Steering's training files, which differ from those of the benchmarks.
"""

import importlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import registrar
from moresjax.data.samples import IMAGE_MARK

SEED = 42
# Sizes of the multi-scale experiments, by name.
SIZES = {"1K": 1_000, "5K": 5_000, "10K": 10_000}
SHORT = "Answer the question using a single word or phrase."

Generator = Callable[[Path, str, random.Random], Iterator[dict]]
TASKS: dict[str, Generator] = {}


def register_task(name: str) -> Callable[[Generator], Generator]:
    """A decorator that makes a generator available to `moresjax data build` under a name.

    Raises:
      UserError: The name belongs to another generator.
    """
    return registrar(TASKS, "task", name)


def build_task(
    name: str, root: str | Path, out: str | Path, *, split: str = "train", size: str = ""
) -> dict[str, int]:
    """Writes the file of a task.

    Args:
      name: The name of the task.
      root: The folder of the official download; the image root of the written file.
      out: The JSON file to write.
      split: The name that the download gives to the split.
      size: `1K`, `5K`, `10K` or a number of samples; a smaller task is taken whole. Empty: all.

    Returns:
      How many samples there are, and how many were written.

    Raises:
      UserError: The task or the size is unknown, or the download lacks a file.
    """
    importlib.import_module("moresjax.data.tasks")
    load_plugins()
    if name not in TASKS:
        raise choice_error("task", name, sorted(TASKS))
    if size and size not in SIZES and not (size.isdecimal() and int(size)):
        raise choice_error("size", size, (*SIZES, "a number of samples"))
    if not Path(root).is_dir():
        raise UserError(f"data root {root} is not a folder")
    records = list(TASKS[name](Path(root), split, random.Random(SEED)))
    if not records:
        raise UserError(f"task {name}: {root} has no samples of split {split!r}")
    chosen = draw_records(records, SIZES.get(size) or int(size)) if size else records
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(chosen, indent=1) + "\n")
    return {"available": len(records), "written": len(chosen)}


def draw_records(records: Sequence[dict], size: int) -> list[dict]:
    """`min(size, len(records))` different records, drawn with the fixed seed."""
    return random.Random(SEED).sample(list(records), min(size, len(records)))


def record(name: object, image: str, question: str, answer: object) -> dict:
    """One question about one image, in LLaVA's format."""
    rounds = [("human", f"{IMAGE_MARK}\n{question}"), ("gpt", str(answer))]
    conversations = [{"from": role, "value": value} for role, value in rounds]
    return {"id": str(name), "image": image, "conversations": conversations}


def read_json(root: Path, name: str) -> Any:
    """A file of the download.

    Raises:
      UserError: It does not exist or is not JSON.
    """
    path = root / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; it belongs to the task's official download")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def coco_questions(root: Path, split: str, prefix: str) -> Iterator[tuple[dict, dict, str]]:
    """The question, annotation and image of every question of VQA files over COCO.

    Args:
      root: The folder of the official download.
      split: `train` or `val`.
      prefix: The version's prefix of file names, `v2_` or nothing.
    """
    asked = read_json(root, f"{prefix}OpenEnded_mscoco_{split}2014_questions.json")["questions"]
    file = f"{prefix}mscoco_{split}2014_annotations.json"
    answered = {a["question_id"]: a for a in read_json(root, file)["annotations"]}
    for question in asked:
        number = question["question_id"]
        if number not in answered:
            raise UserError(f"question {number} has no annotation in {root / file}")
        image = f"{split}2014/COCO_{split}2014_{question['image_id']:012d}.jpg"
        yield question, answered[number], image
