"""Answers to a file of prompts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.data.images import LazyPixels
from moresjax.data.llava import image_path
from moresjax.data.records import JsonRecords
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.inference.model import Model

WINDOW = 32  # batches of records that are held at a time


def generate_file(
    model: Model,
    source: str | Path,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    on_answer: Callable[[dict], None] | None = None,
) -> dict[str, int]:
    """Answers every prompt of a JSON or JSON Lines file.

    >>> import pathlib, tempfile
    >>> from moresjax.testing import talking_model
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "in.jsonl").write_text('{"prompt": "how many ?"}')
    >>> generate_file(talking_model(), folder / "in.jsonl", folder / "out.jsonl", max_new_tokens=2)
    {'records': 1, 'errors': 0}

    Args:
      model: The model that answers.
      source: Records `{"id", "prompt", "images", "seed"}`. `images` is a list of paths and `seed`
        seeds the record's draws; both may be missing, as may `id`, which then is the record's
        number.
      out: JSON Lines in the same order, `{"id", "prompt", "images", "text"}`; a record that cannot
        be answered has the reason as `error` instead of `text`.
      image_root: The folder that paths of images start from; default: that of `source`.
      max_new_tokens: An answer has at most this many tokens.
      batch_size: How many prompts are answered at a time.
      sampling: How tokens are chosen; greedy by default.
      stop: An answer ends before the first of these strings.
      on_answer: Called with every line.

    Returns:
      How many records there were (`records`) and how many of them failed (`errors`).

    Raises:
      UserError: `source` cannot be read, `out` cannot be written, or an option is bad.
    """
    source, out = Path(source), Path(out)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the file of prompts; the answers need another one")
    root = source.parent if image_root is None else Path(image_root)
    records, errors = JsonRecords.scan(source), 0
    with _create(out) as file:
        for start in range(0, len(records), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(records)))
            lines, rows, known = [], [], {}
            for number in window:
                record = records[number]
                named = isinstance(record, dict) and "id" in record
                lines.append({"id": record["id"] if named else number})
                try:
                    lines[-1] |= _checked(record, number)
                    rows.append(_row(model, lines[-1], root, max_new_tokens, known))
                except UserError as error:
                    lines[-1]["error"] = str(error)
                    errors += 1
            good = [line for line in lines if "error" not in line]
            seeds = [line.pop("seed", sampling.seed) for line in good]
            done = model.service.generate_many(
                rows,
                max_new_tokens,
                batch_size=batch_size,
                sampling=sampling,
                seeds=seeds,
                stop=stop,
            )
            for line, completion in zip(good, done, strict=True):
                line["text"] = model.prompts.text(completion.tokens, stop)
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if on_answer is not None:
                    on_answer(line)
    return {"records": len(records), "errors": errors}


def _create(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _checked(record: Any, number: int) -> dict:
    """The known fields of a record.

    Raises:
      UserError: when one is missing or of another type.
    """
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"record {number} has no text as its 'prompt'")
    images, seed = record.get("images") or [], record.get("seed")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"record {number}: 'images' must be a list of paths, got {images!r}")
    line = {"prompt": record["prompt"], "images": images}
    if seed is None:
        return line
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"record {number}: 'seed' must be a whole number below 2**32, got {seed!r}")
    return line | {"seed": seed}


def _row(model: Model, line: dict, root: Path, max_new_tokens: int, known: dict) -> Row:
    name = str(line["id"])
    paths = [image_path(root, image, name) for image in line["images"]]
    row = model.prompts.row(line["prompt"], paths, name, known)
    model.service.check_context(row, max_new_tokens)
    if isinstance(row.pixels, LazyPixels):
        row.pixels.open()  # a broken image is this record's error
    return row
