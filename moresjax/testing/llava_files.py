"""A small data set in LLaVA's format, with images, made anew for each test module."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moresjax.data.digits import CELLS, WORDS, build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template

SIDE, VISUAL = 12, 9  # of the tiny model's images
PROCESSOR = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(SIDE), VISUAL)


def conversation(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice([*WORDS, *CELLS], count))


def make_images(root: Path, count: int, seed: int = 0) -> list[str]:
    """Random pictures of several shapes and formats below `root`."""
    rng = np.random.default_rng(seed)
    names = []
    for number in range(count):
        name = f"part{number % 2}/{number:03d}.{('png', 'jpg')[number % 2]}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shape = rng.integers(8, 20, 2)
        Image.fromarray(rng.integers(0, 256, (*shape, 3)).astype(np.uint8)).save(root / name)
        names.append(name)
    return names


def make_records(images: list[str], count: int, seed: int = 0) -> list[dict]:
    """Conversations with an image (two thirds of them), with two, and about nothing."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        rounds = [words(rng, int(rng.integers(1, 12))) for _ in range(2 * rng.integers(1, 3))]
        record: dict[str, Any] = {"id": f"{number:04d}"}
        if number % 7 == 0:
            record["image"] = [images[0], images[number % len(images)]]
            rounds[0] = f"<image> and <image> {rounds[0]}"
        elif number % 3:
            record["image"] = images[number % len(images)]
            rounds[0] = ("<image>\n{}", "{}\n<image>")[number % 2].format(rounds[0])
        records.append(record | {"conversations": conversation(*rounds)})
    return records


def write_list(path: Path, records: list) -> str:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    return str(path)


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)
