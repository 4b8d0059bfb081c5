"""Records of JSON and JSON Lines files, read one at a time.

A file of 665,000 conversations is a gigabyte of text and several of Python objects. It is read
through once to note where every record stands, and again record by record when one is asked for.
"""

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError

CHUNK = 1 << 22  # bytes read at once
# The keys under which an object around the records may have their list, and where it must begin.
WRAPPERS = ("data", "questions")
HEAD = 1 << 16  # bytes
# Between records: list brackets, commas, blanks, a byte order mark.
_BETWEEN = re.compile("[\\s,\\[\\]\ufeff]*")
# The key of an object, with what stands around it.
_KEY = r'\s*("(?:[^"\\]|\\.)*")\s*:\s*'
_OPENING = re.compile("[\\s\ufeff]*\\{" + _KEY)
_NEXT_KEY = re.compile(r"\s*," + _KEY)


@dataclasses.dataclass(frozen=True)
class JsonRecords:
    """Random access to the records of a file; 12 bytes are held for each, and 4 for each number.

    Attributes:
      path: A JSON list, an object with one under `data` or `questions`, or JSON Lines.
      offsets: The number of bytes before each record.
      lengths: The number of bytes of each record.
      sizes: The numbers that `measure` gave for each record.
    """

    path: Path
    offsets: Int[np.ndarray, "n"]
    lengths: Int[np.ndarray, "n"]
    sizes: Int[np.ndarray, "n k"]

    @classmethod
    def scan(
        cls, path: str | Path, measure: Callable[[Any], tuple[int, ...]] = lambda _: ()
    ) -> "JsonRecords":
        """Finds the records of a file.

        Args:
          path: A JSON list, an object with one under `data` or `questions`, or JSON Lines.
          measure: Gives k numbers for a record, which are kept as `sizes`.

        Raises:
          UserError: The file does not exist, is not JSON, or ends early.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"data file {path} does not exist")
        start = _list_inside(path)
        if start is None:
            _check_whole(path)
        records = _records(path, start)
        found = [(offset, length, *measure(record)) for offset, length, record in records]
        if not found:
            raise UserError(f"data file {path} has no records")
        table = np.asarray(found, np.int64)
        return cls(path, table[:, 0], table[:, 1].astype(np.int32), table[:, 2:].astype(np.int32))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            return json.loads(file.read(int(self.lengths[index])))


def _check_whole(path: Path) -> None:
    """Refuses a list without its closing bracket: the copying of a file was interrupted."""
    with path.open("rb") as file:
        opening = file.read(16).lstrip(b" \t\r\n\xef\xbb\xbf")[:1]
        file.seek(max(path.stat().st_size - 16, 0))
        closing = file.read().rstrip()[-1:]
    if opening == b"[" and closing != b"]":
        raise UserError(f"data file {path} ends in the middle of its list")


def _list_inside(path: Path) -> int | None:
    """The first byte of the list that an object holds under one of `WRAPPERS`; None without one."""
    with path.open("rb") as file:
        text = codecs.getincrementaldecoder("utf-8")("ignore").decode(file.read(HEAD))
    found = _OPENING.match(text)
    while found is not None:
        if found[1][1:-1] in WRAPPERS and text.startswith("[", found.end()):
            return len(text[: found.end() + 1].encode())
        try:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
        except json.JSONDecodeError:
            return None
        found = _NEXT_KEY.match(text, end)
    return None


def _records(path: Path, start: int | None) -> Iterator[tuple[int, int, Any]]:
    """The first byte, the number of bytes and the value of every record.

    Args:
      path: The file.
      start: The first byte of a list inside of an object; None where there is no such list.
    """
    decode = json.JSONDecoder().raw_decode
    utf8 = codecs.getincrementaldecoder("utf-8")()
    text, place, offset, number, ended = "", 0, start or 0, 0, False
    depth = 1  # of the list inside of an object, which ends at 0
    with path.open("rb") as file:
        file.seek(offset)
        while not ended:
            chunk = file.read(CHUNK)
            ended = not chunk
            try:
                text, place = text[place:] + utf8.decode(chunk, final=ended), 0
            except UnicodeDecodeError:
                raise UserError(f"data file {path} is not UTF-8 text") from None
            while True:
                between = _BETWEEN.match(text, place)
                end = place if between is None else between.end()
                skipped = text[place:end]
                depth += skipped.count("[") - skipped.count("]")
                if start is not None and depth <= 0:
                    return
                offset += len(skipped.encode())
                place = end
                if place == len(text):
                    break
                try:
                    record, end = decode(text, place)
                except json.JSONDecodeError as error:
                    # A record that goes on in the next chunk fails where the text ends.
                    cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                    if cut and not ended:
                        break
                    message = f"{path}: record {number} is not JSON: {error.msg}"
                    raise UserError(message) from None
                length = len(text[place:end].encode())
                yield offset, length, record
                offset, place, number = offset + length, end, number + 1
    if start is not None:
        raise UserError(f"data file {path} ends in the middle of its list")
