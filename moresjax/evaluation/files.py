"""Reading benchmarks' official files, and predictions in their official result formats.

`DATA_ROOT/NAME/` holds a benchmark's download. Photos of COCO, which several benchmarks share, are
in `DATA_ROOT/coco/val2014/`, `DATA_ROOT/coco/test2015/` and so on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moresjax.core import reading
from moresjax.core.errors import UserError, choice_error
from moresjax.core.reading import LARGE, check, read_json_lines
from moresjax.data.images import UnusableImage, named_image
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Example

LETTERS = "ABCDEFGH"
SHORT = "Answer the question using a single word or phrase."
PICK_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."

DataRoot = str | Path | None
T = TypeVar("T")


def benchmark_folder(name: str, data_root: DataRoot) -> Path:
    """The folder of a benchmark's download.

    Raises:
      UserError: No data root is given, or it has no such folder.
    """
    if data_root is None:
        raise UserError(f"task {name} reads its official files; say where they are: --data-root")
    folder = Path(data_root) / name
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; task {name} needs its official download there")
    return folder


def check_split(name: str, split: str, allowed: Sequence[str]) -> str:
    """The split, if the benchmark `name` has it.

    Raises:
      UserError: The benchmark has no such split.
    """
    if split not in allowed:
        raise choice_error(f"split of {name}", split, allowed)
    return split


def require_file(path: Path) -> Path:
    """The path, if there is a file.

    Raises:
      UserError: There is no file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; it belongs to the task's official download")
    return path


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: The file does not exist or is not JSON.
    """
    return reading.read_json(require_file(folder / name), most=LARGE)


def read_jsonl(folder: Path, name: str, ending: str = "") -> list[Any]:
    """The values of a JSON Lines file; empty lines are skipped.

    Args:
      folder: The folder of the file.
      name: The file's name.
      ending: What a line may have behind its value.

    Raises:
      UserError: The file does not exist, or a line is not JSON.
    """
    return read_json_lines(require_file(folder / name), ending=ending)


def limit_rows(
    rows: Sequence[T],
    limit: int | None,
    title: str,
    expected: int | None = None,
    strict: bool = True,
) -> list[T]:
    """The first `limit` rows, or all of them, whose number must then be the published one.

    Args:
      rows: The rows of an official file.
      limit: The number of rows to keep; None keeps all.
      title: What messages call the rows, such as `vqav2 val`.
      expected: The published number of rows, where there is one.
      strict: Another number raises an error; otherwise it logs a warning.

    Raises:
      UserError: There are no rows, or not as many as published.
    """
    if not rows:
        raise UserError(f"{title}: the files hold no questions")
    if limit is None and expected is not None and len(rows) != expected:
        message = (
            f"{title}: the files hold {len(rows):,d} questions, the published set {expected:,d}; "
            "complete the download, or give a limit"
        )
        if strict:
            raise UserError(message)
        logging.getLogger(__name__).warning(message)
    return list(rows[:limit])


def image_file(folder: Path, name: object, example: object) -> Path | bytes | UnusableImage:
    """The image that an official file names.

    Args:
      folder: The folder that the name starts from.
      name: The name in the official file.
      example: The id of the question, for the error message.

    Returns:
      The path, or the bytes of a `data:` URL; where the name leads out of the folder or to the
      network, what costs only this question.
    """
    try:
        return named_image(folder, str(name), f"question {example}")
    except UserError as error:
        return UnusableImage(str(error))


def coco_image(data_root: DataRoot, split: str, number: int) -> Path:
    """The photo with this number in a split of COCO such as `val2014`."""
    return Path(data_root or ".") / "coco" / split / f"COCO_{split}_{number:012d}.jpg"


def llava_prompt(question: str, ending: str = SHORT, images: int = 1) -> str:
    r"""A prompt of LLaVA-1.5: image marks, question and ending on lines of their own.

    >>> llava_prompt("Is it red?")
    '<image>\nIs it red?\nAnswer the question using a single word or phrase.'
    """
    return "\n".join([*[IMAGE_MARK] * images, question, *([ending] if ending else [])])


def with_options(question: str, options: Sequence[str]) -> str:
    r"""The question followed by its options as lettered lines.

    >>> with_options("Which?", ["salt", "tea"])
    'Which?\nA. salt\nB. tea'
    """
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
    return "\n".join([question, *lines])


def example_from_record(
    record: Mapping[str, Any], folder: Path, metadata: Mapping[str, Any] | None = None
) -> Example:
    """The question of a LLaVA record whose image lies below `folder`."""
    human, gpt = record["conversations"]
    images = (image_file(folder, record["image"], record["id"]),)
    return Example(record["id"], human["value"], gpt["value"], images, metadata=metadata or {})


class Unlabelled(NamedTuple):
    """A prediction of a file without ids, and the question beside it where there is one."""

    text: str
    question: str = ""


# An id or a prediction as authors write them; nothing is none.
Written = str | int | float | bool
# Predictions by id, or in the order of the questions where a format has no ids.
SavedPredictions = Mapping[str, str] | Sequence[Unlabelled]
ResultReader = Callable[[Path], SavedPredictions]


def result_reader(id_field: str | None, text_field: str) -> ResultReader:
    """A reader of result files: rows (JSON or JSON Lines) with two fields, or texts by id.

    Args:
      id_field: The field with the question's id; None where the order of the rows is all there is.
      text_field: The field with the prediction.

    Returns:
      A function from a file to its predictions, by id or in order.
    """

    def read(path: Path) -> SavedPredictions:
        data = load_results(path)
        fields = {field for field in (id_field, text_field) if field is not None}
        if isinstance(data, Mapping) and fields <= set(data):
            data = [data]  # JSON Lines of one line
        if isinstance(data, Mapping):
            check(data, dict[str, Written], str(path))
            return {str(key): str(text) for key, text in data.items()}
        check(data, list[dict[str, Any]], str(path))
        for number, row in enumerate(data):
            for field in sorted(fields):
                if field not in row:
                    raise UserError(f"row {number} of {path} has no field {field!r}")
                check(row[field], Written, f"field {field!r} in row {number} of {path}")
        if id_field is None:
            return [Unlabelled(str(row[text_field]), str(row.get("question", ""))) for row in data]
        return {str(row[id_field]): str(row[text_field]) for row in data}

    return read


def choice_reader(read: ResultReader, choice: Callable[[str, int], str]) -> ResultReader:
    """A reader that also takes what authors of multiple-choice benchmarks save, as numbers.

    Args:
      read: Reads every other file.
      choice: The text for the id of a question and the number of a choice, beginning with 0.

    Returns:
      A function from a file to its predictions by id, where the file is an object whose `results`
      holds the number of a choice, or a text, by id; else what `read` returns.
    """

    def read_either(path: Path) -> SavedPredictions:
        data = load_results(path)
        results = data.get("results") if isinstance(data, Mapping) else None
        if not isinstance(results, Mapping):
            return read(path)
        check(results, dict[str, str | int], str(path))
        return {
            name: choice(name, value) if isinstance(value, int) else str(value)
            for name, value in results.items()
        }

    return read_either


def load_results(path: Path) -> Any:
    """The content of a result file: JSON, or JSON Lines, whose lines may end in commas.

    Raises:
      UserError: The file does not exist, or is neither.
    """
    try:
        return read_json(path.parent, path.name)
    except UserError:
        return read_jsonl(path.parent, path.name, ending=",")
