"""Records of JSON and JSON Lines files, read one at a time.

A file of 665,000 conversations is a gigabyte of text and several of Python objects. It is read
through once to note where every record stands, and again record by record when one is asked for.
"""

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError
from moresjax.core.reading import DEPTH, LINE, check_depth, check_file, reason_of

CHUNK = 1 << 22  # bytes read at once
# The keys under which an object around the records may have their list, and where it must begin.
WRAPPERS = ("data", "questions")
HEAD = 1 << 16  # bytes
# Between records.
_BETWEEN = re.compile("[\\s,\ufeff]*")
# The key of an object, with what stands around it.
_KEY = r'\s*("(?:[^"\\]|\\.)*")\s*:\s*'
_OPENING = re.compile("[\\s\ufeff]*\\{" + _KEY)
_NEXT_KEY = re.compile(r"\s*," + _KEY)
_DECODE = json.JSONDecoder().raw_decode


class ChangedFile(UserError):
    """A file is not any more what it was when its records were found: no sample of it is safe."""


@dataclasses.dataclass(frozen=True)
class JsonRecords:
    """Random access to the records of a file; 12 bytes are held for each, and 4 for each number.

    Attributes:
      path: A JSON list, an object with one under `data` or `questions`, or JSON Lines.
      offsets: The number of bytes before each record.
      lengths: The number of bytes of each record.
      sizes: The numbers that `measure` gave for each record.
      state: The size and the time of the last change of the file when its records were found.
    """

    path: Path
    offsets: Int[np.ndarray, "n"]
    lengths: Int[np.ndarray, "n"]
    sizes: Int[np.ndarray, "n k"]
    state: tuple[int, int]

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
        path = check_file(path, what="data file")
        state = _state(path.stat())
        records = _records(path, _list_inside(path))
        found = [(offset, length, *measure(record)) for offset, length, record in records]
        if not found:
            raise UserError(f"data file {path} has no records")
        table = np.asarray(found, np.int64)
        lengths, sizes = table[:, 1].astype(np.int32), table[:, 2:].astype(np.int32)
        return cls(path, table[:, 0], lengths, sizes, state)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        try:
            with self.path.open("rb") as file:
                same = _state(os.fstat(file.fileno())) == self.state
                file.seek(int(self.offsets[index]))
                content = file.read(int(self.lengths[index]))
        except OSError as error:
            raise ChangedFile(
                f"data file {self.path} cannot be read any more: {reason_of(error)}"
            ) from None
        if not same:
            raise ChangedFile(
                f"data file {self.path} has changed while it was in use; begin again with what it "
                "is now"
            )
        record = json.loads(content)
        check_depth(record, f"{self.path}: record {index}")
        return record


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


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
        except (ValueError, RecursionError):
            return None
        found = _NEXT_KEY.match(text, end)
    return None


def _records(path: Path, start: int | None) -> Iterator[tuple[int, int, Any]]:
    """The first byte, the number of bytes and the value of every record.

    Args:
      path: The file.
      start: The first byte of a list inside of an object; None where there is no such list.
    """
    try:
        with path.open("rb") as file:
            file.seek(start or 0)
            yield from _Scanner(path, file, start or 0).records(inside=start is not None)
    except UnicodeDecodeError:
        raise UserError(f"data file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {reason_of(error)}") from None


class _Scanner:
    """Finds the records of a file, of which it holds a piece at a time.

    Args:
      path: The file.
      file: The same, open at `offset`.
      offset: The number of bytes before what is read first.
    """

    def __init__(self, path: Path, file: BinaryIO, offset: int) -> None:
        self._path, self._file = path, file
        self._text, self._place, self._offset = "", 0, offset  # the byte at `place` of the text
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._ended = False

    def records(self, *, inside: bool) -> Iterator[tuple[int, int, Any]]:
        """First byte, number of bytes and value of each; `inside` a list, which has begun."""
        listed = inside
        if not inside and self._next() == "[":
            self._pass(self._place + 1)
            listed = True
        number = 0
        while first := self._next():
            if listed and first == "]":
                self._pass(self._place + 1)
                if not inside and self._next():
                    raise UserError(f"data file {self._path} has text after its list")
                return
            record, end = self._decode(f"{self._path}: record {number}")
            offset, length = self._offset, self._pass(end)
            if length > LINE:
                raise UserError(
                    f"{self._path}: record {number} has {length:,d} bytes; at most {LINE:,d} are "
                    "read"
                )
            yield offset, length, record
            number += 1
        if listed:
            raise UserError(f"data file {self._path} ends in the middle of its list")

    def _next(self) -> str:
        """The next character that is not between records; empty at the end of the file."""
        while True:
            between = _BETWEEN.match(self._text, self._place)
            self._pass(self._place if between is None else between.end())
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read()

    def _pass(self, end: int) -> int:
        """Goes on to a place in the text; returns the number of bytes before it."""
        length = len(self._text[self._place : end].encode())
        self._offset, self._place = self._offset + length, end
        return length

    def _read(self) -> None:
        """Reads as much again as is held, so that a long record is not decoded too often."""
        rest = self._text[self._place :]
        chunk = self._file.read(max(CHUNK, len(rest)))
        self._ended = not chunk
        self._text, self._place = rest + self._utf8.decode(chunk, final=self._ended), 0

    def _decode(self, where: str) -> tuple[Any, int]:
        """The value at the present place, and the place where it ends."""
        while True:
            try:
                value, end = _DECODE(self._text, self._place)
                if end < len(self._text) or self._ended:
                    return value, end
            except RecursionError:
                raise UserError(f"{where} is nested more than {DEPTH} deep") from None
            except ValueError as error:
                said = getattr(error, "msg", "a number has thousands of digits")
                # What goes on in the next chunk fails where the text ends.
                near = getattr(error, "pos", 0) > len(self._text) - 16
                if self._ended or not (near or said.startswith("Unterminated")):
                    raise UserError(f"{where} is not JSON: {said}") from None
            self._read()
