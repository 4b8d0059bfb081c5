"""JSON files that are whole or not there, and damaged ones told in a sentence.

Everything that a run, an evaluation or an export writes as JSON goes through `write_json`, or
`append_log` for a file of lines; a process that is killed at any moment leaves the old file or the
new one.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from moresjax.core.folders import explain_disk, replace_file
from moresjax.core.reading import read_json, read_json_lines, scan_json_lines

_BLOCK = 1 << 16  # bytes that are looked through at a time for the end of a line


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: The file is damaged, or holds something else.
    """
    return read_json(file, dict[str, Any])


def write_json(file: str | Path, value: Any, *, indent: int | None = 2, **options: Any) -> None:
    """Writes a JSON file; a killed process leaves the old one or the new one.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "train.json")
    >>> write_json(file, {"step": 3})
    >>> read_json(file)
    {'step': 3}

    Args:
      file: The file, in a folder that is there.
      value: What it will hold.
      indent: Spaces per level; None for one line.
      options: Further options of `json.dumps`.

    Raises:
      UserError: The file cannot be written.
    """
    replace_file(Path(file), json.dumps(value, indent=indent, **options) + "\n")


def read_log(file: Path, kind: Any = dict[str, Any]) -> list[Any]:
    """The values of a file of JSON lines; no file has none.

    A last line that a killed process left unfinished is dropped, and empty lines are skipped.

    Args:
      file: The file.
      kind: The type of every line; see `moresjax.core.reading.check`.

    Raises:
      UserError: Another line is damaged, or of another type.
    """
    return read_json_lines(file, kind, torn=True) if file.exists() else []


def scan_log(file: Path, kind: Any = dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The values of a file of JSON lines as `read_log` has them, and what is wrong with others."""
    if not file.exists():
        return [], []
    values, damaged = scan_json_lines(file, kind, torn=True)
    return values, [str(error) for error in damaged]


def write_log(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines as a whole."""
    replace_file(file, "".join(json.dumps(row) + "\n" for row in rows))


def append_log(file: Path, row: Mapping[str, Any]) -> None:
    """Adds a line to a file of JSON lines.

    A process that is killed meanwhile leaves a part of a line, which `read_log` drops and
    the next `append_log` overwrites.

    Raises:
      UserError: The file cannot be written.
    """
    with explain_disk(file), file.open("ab+") as lines:
        end_last_line(lines)
        lines.write(json.dumps(row).encode() + b"\n")


def end_last_line(lines: IO[bytes]) -> None:
    """Ends the last line of a file that is open for reading and appending.

    One that is only a part of a line is removed.
    """
    size = lines.seek(0, os.SEEK_END)
    lines.seek(max(size - 1, 0))
    if lines.read(1) in (b"", b"\n"):
        return
    start, tail = size, b""
    while start and b"\n" not in tail:
        start, end = max(start - _BLOCK, 0), start
        lines.seek(start)
        tail = lines.read(end - start) + tail
    rest = tail.rpartition(b"\n")[2]
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        lines.truncate(size - len(rest))
    else:
        lines.write(b"\n")
