"""Reading benchmarks' official files, and predictions in their official result formats.

`DATA_ROOT/NAME/` holds a benchmark's download; images of COCO, which several benchmarks share, are
in `DATA_ROOT/coco/val2014/` and so on.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moresjax.core.errors import UserError, choice_error
from moresjax.data.generators import SHORT, read_json
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Item

LETTERS = "ABCDEFGH"
PICK_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."


def folder_of(name: str, data_root: str | Path | None) -> Path:
    """The folder of a benchmark's download.

    Raises:
      UserError: when no data root is given, or it has no such folder.
    """
    if data_root is None:
        raise UserError(f"task {name} reads its official files; say where they are: --data-root")
    folder = Path(data_root) / name
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; task {name} needs its official download there")
    return folder


def choose_split(name: str, split: str, allowed: Sequence[str]) -> str:
    """The split, if the benchmark has it."""
    if split not in allowed:
        raise choice_error(f"split of {name}", split, allowed)
    return split


def need_file(path: Path) -> Path:
    """The path, if there is a file.

    Raises:
      UserError: if not.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; it belongs to the task's official download")
    return path


def read_lines(root: Path, name: str) -> list[Any]:
    """The values of a JSON Lines file.

    Raises:
      UserError: when it does not exist, or a line is not JSON.
    """
    path, values = need_file(root / name), []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from None
    return values


def first(
    rows: Sequence, limit: int | None, what: str, official: int | None = None, sure: bool = True
) -> list:
    """The first `limit` rows, or all of them, whose number must then be the published one.

    Args:
      rows: of the file.
      limit: number of rows to keep.
      what: name of the rows in messages.
      official: the published number, where there is one.
      sure: whether another number is an error, or just a warning.

    Raises:
      UserError: without rows, or for another number than the published one.
    """
    if not rows:
        raise UserError(f"{what}: the files hold no questions")
    if limit is None and official is not None and len(rows) != official:
        message = (
            f"{what}: the files hold {len(rows):,d} questions, the published set {official:,d}; "
            "complete the download, or give a limit"
        )
        if sure:
            raise UserError(message)
        logging.getLogger(__name__).warning(message)
    return list(rows[:limit])


def coco_image(data_root: str | Path | None, split: str, number: int) -> Path:
    """The image of a number in a split such as `val2014`."""
    return Path(data_root or ".") / "coco" / split / f"COCO_{split}_{number:012d}.jpg"


def ask(question: str, ending: str = SHORT, images: int = 1) -> str:
    """A prompt of LLaVA-1.5: image marks, question and ending on lines of their own."""
    return "\n".join([*[IMAGE_MARK] * images, question, *([ending] if ending else [])])


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with `A. text` lines."""
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
    return "\n".join([question, *lines])


def record_item(record: Mapping, folder: Path, facts: Mapping[str, Any] | None = None) -> Item:
    """The question of a LLaVA record, with the images below `folder`."""
    human, gpt = record["conversations"]
    images = (folder / record["image"],)
    return Item(record["id"], human["value"], gpt["value"], images, facts=facts or {})


def _load(path: Path) -> Any:
    """A JSON or JSON Lines file."""
    try:
        return read_json(path.parent, path.name)
    except UserError:
        return read_lines(path.parent, path.name)


class Unlabelled(NamedTuple):
    """A prediction of a file without ids, and the question beside it where there is one."""

    text: str
    question: str = ""


def read_rows(
    id_field: str | None, text_field: str
) -> Callable[[Path], dict[str, str] | list[Unlabelled]]:
    """A reader of result files: a list (JSON or JSON Lines) of rows with these fields, or an object
    of texts by id.

    Args:
      id_field: field of the id; None where the order of the rows is all there is.
      text_field: field of the prediction.

    Returns:
      File to predictions by id, or in order without an `id_field`.
    """

    def read(path: Path) -> dict[str, str] | list[Unlabelled]:
        data = _load(path)
        fields = set(filter(None, (id_field, text_field)))
        if isinstance(data, Mapping) and fields <= set(data):
            data = [data]  # JSON Lines of one line
        if isinstance(data, Mapping):
            return {str(key): str(text) for key, text in data.items()}
        for number, row in enumerate(data):
            for field in sorted(fields):
                if not isinstance(row, Mapping) or field not in row:
                    raise UserError(f"row {number} of {path} has no field {field!r}")
        if id_field is None:
            return [Unlabelled(str(row[text_field]), str(row.get("question", ""))) for row in data]
        return {str(row[id_field]): str(row[text_field]) for row in data}

    return read


def read_log(path: Path) -> list[dict]:
    """Rows of a file; a last line that a killed process left unfinished is dropped.

    Raises:
      UserError: for another damaged line.
    """
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not JSON: {error}") from None
    return rows


def write_log(path: Path, rows: Iterable[Mapping]) -> None:
    """Replaces the file as a whole."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace_file(path: Path, text: str) -> None:
    """Writes a file such that a killed process leaves the old one or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
