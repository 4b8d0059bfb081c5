"""The one way in for what others have written: bounded in size and depth, checked against a type.

Everything that is wrong with a file is one `UserError` with its path and, where there is one, the
line. The types are what `msgspec` knows: classes of fields (`TypedDict`, dataclasses), unions,
lists, and numbers and texts with `Annotated` bounds.
"""

import functools
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from moresjax.core.errors import UserError

SMALL = 1 << 24  # bytes of a file that describes something: a config, an adapter, results
LARGE = 1 << 32  # bytes of a file of data that is read at once
_PIECE = 1 << 20  # bytes read at once
LINE = 1 << 26  # bytes of one line or record, which may hold an image as a data: URL
IMAGE = 1 << 28  # bytes of the file of an image
DEPTH = 100  # lists and objects inside of each other

# Numbers of files. Beyond 32 bits there is no layer, token, rank or step.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_file(path: str | Path, *, what: str = "", most: int | None = None) -> Path:
    """The path, if a regular file of at most `most` bytes is there.

    >>> check_file("/dev/zero")
    Traceback (most recent call last):
    ...
    moresjax.core.errors.UserError: /dev/zero is a device, not a file

    Args:
      path: The path, as a user or a file gives it.
      what: What the message calls the file, such as `data file`.
      most: The largest size in bytes; None for any.

    Raises:
      UserError: There is no such file, it is no regular file, too large, or cannot be looked at.
    """
    name = _named(what, path)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, too long a name, a zero byte
        raise UserError(f"{name} cannot be read: {reason_of(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((word for test, word in _KINDS.items() if test(found.st_mode)), "no file")
        raise UserError(f"{name} is {kind}, not a file")
    if most is not None and found.st_size > most:
        raise UserError(f"{name} has {found.st_size:,d} bytes; at most {most:,d} are read")
    return Path(path)


def _named(what: str, path: str | Path) -> str:
    """What messages call a file."""
    return f"{what} {path}" if what else str(path)


def reason_of(error: BaseException) -> str:
    """What an error says, without the path that an `OSError` repeats."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def read_bytes(path: str | Path, *, what: str = "", most: int = SMALL) -> bytes:
    """The content of a file; see `read_text`.

    Raises:
      UserError: It is no such file, see `check_file`.
    """
    check_file(path, what=what, most=most)
    name = _named(what, path)
    try:
        with open(path, "rb") as file:
            # Piece by piece, since a buffer of the largest size would be taken at once.
            pieces = iter(functools.partial(file.read, _PIECE), b"")
            content = b"".join(itertools.islice(pieces, most // _PIECE + 1))
    except OSError as error:
        raise UserError(f"{name} cannot be read: {reason_of(error)}") from None
    if len(content) > most:  # files of /proc say that they are empty
        raise UserError(f"{name} has more than {most:,d} bytes")
    return content


def read_text(path: str | Path, *, what: str = "", most: int = SMALL) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
      path: The path.
      what: What the message calls the file.
      most: The largest number of bytes.

    Raises:
      UserError: It is no such file, see `check_file`, or is not UTF-8.
    """
    name = _named(what, path)
    try:
        return read_bytes(path, what=what, most=most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} cannot be used: it is not UTF-8 text") from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    >>> parse_json("[" * 20_000, "a.json")
    Traceback (most recent call last):
    ...
    moresjax.core.errors.UserError: a.json cannot be used: it is nested more than 100 deep

    Args:
      text: The text.
      where: What the message calls it: a file, or a line of one.

    Raises:
      UserError: It is not JSON, nested too deeply, or has numbers or characters that do not exist.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # half of a pair is a text for Python, but has no bytes
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{where} cannot be used: it is nested more than {DEPTH} deep") from None
    except UnicodeError:
        raise UserError(
            f"{where} cannot be used: it has half of a surrogate pair, which is no character"
        ) from None
    except ValueError as error:
        said = "a number has thousands of digits" if "digits" in str(error) else error
        raise UserError(f"{where} cannot be used: it is not JSON: {said}") from None
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value, where)
    return value


def check_depth(value: Any, where: str) -> None:
    """Refuses a value whose lists and objects are nested more than `DEPTH` deep.

    Raises:
      UserError: They are.
    """
    level = [value]
    for _ in range(DEPTH):
        level = [child for node in level for child in _inside(node)]
        if not level:
            return
    raise UserError(f"{where} cannot be used: it is nested more than {DEPTH} deep")


def _inside(node: Any) -> Iterator[Any]:
    """The lists and objects that a list or an object holds."""
    held = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (child for child in held if isinstance(child, dict | list))


def check(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of a type.

    >>> check({"rank": "two"}, dict[str, int], "tuning.json")
    Traceback (most recent call last):
    ...
    moresjax.core.errors.UserError: tuning.json cannot be used: expected `int`, got `str` at [...]

    Args:
      value: What a file holds.
      kind: The type; of a `TypedDict`, other keys may be there too.
      where: What the message calls the file.

    Raises:
      UserError: It is of another type; names the place in the value.
    """
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        said, _, place = str(error).partition(" - at ")
        said = said[:1].lower() + said[1:]
        at = f" at {place.strip('`').removeprefix('$').removeprefix('.')}" if place else ""
        raise UserError(f"{where} cannot be used: {said}{at}") from None
    return value


def read_json(path: str | Path, kind: Any = Any, *, what: str = "", most: int = SMALL) -> Any:
    """The value of a JSON file.

    Args:
      path: The path.
      kind: Its type; see `check`.
      what: What the message calls the file.
      most: The largest number of bytes.

    Raises:
      UserError: There is no such file, or it holds something else.
    """
    name = _named(what, path)
    return check(parse_json(read_text(path, what=what, most=most), name), kind, name)


def read_json_lines(
    path: str | Path, kind: Any = Any, *, torn: bool = False, ending: str = ""
) -> list[Any]:
    """The values of a JSON Lines file; empty lines are skipped.

    Args:
      path: The path.
      kind: The type of every line; see `check`.
      torn: Whether a last line that a killed process left unfinished is dropped.
      ending: What a line may have behind its value.

    Raises:
      UserError: There is no such file, or a line holds something else; names the line.
    """
    values, damaged = scan_json_lines(path, kind, torn=torn, ending=ending, most_damaged=1)
    if damaged:
        raise damaged[0]
    return values


def scan_json_lines(
    path: str | Path,
    kind: Any = Any,
    *,
    torn: bool = False,
    ending: str = "",
    most_damaged: int | None = None,
) -> tuple[list[Any], list[UserError]]:
    """The values of a JSON Lines file as `read_json_lines` has them, and what is wrong with others.

    Args:
      path: The path.
      kind: The type of every line.
      torn: Whether a last line that is unfinished is dropped.
      ending: What a line may have behind its value.
      most_damaged: How many damaged lines are read; None for all.
    """
    values: list[Any] = []
    damaged: list[UserError] = []
    for number, line, whole in _lines(check_file(path, most=LARGE)):
        try:
            values += _value(line, kind, f"line {number} of {path}", ending, first=number == 1)
        except UserError as error:
            damaged += [error] if whole or not torn else []
            if len(damaged) == most_damaged:
                break
    return values, damaged


def _value(line: bytes, kind: Any, where: str, ending: str, *, first: bool) -> list[Any]:
    """The value of a line; of an empty one there is none."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{where} cannot be used: it is not UTF-8 text") from None
    return [check(parse_json(text.removesuffix(ending), where), kind, where)] if text else []


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, text and whether its end is there, of every line."""
    try:
        with path.open("rb") as file:
            yield from _bounded(file, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None


def _bounded(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, bool]]:
    lines = iter(functools.partial(file.readline, LINE + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > LINE:
            raise UserError(f"line {number} of {path} has more than {LINE:,d} bytes")
        yield number, line, line.endswith(b"\n")
