"""New folders and files that are complete or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError


def check_new(folder: Path, what: str) -> None:
    """Refuses to write into a folder that has something in it.

    Raises:
      UserError: that says what needs a new folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the {what} needs a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; the {what} needs a new folder")


@contextlib.contextmanager
def new_folder(folder: str | Path, what: str) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes that name at the end.

    When anything is raised, nothing stays.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "out"
    >>> with new_folder(out, "export") as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    >>> [path.name for path in out.iterdir()]
    ['config.json']

    Args:
      folder: A new or empty folder.
      what: What is written, for the message.

    Raises:
      UserError: when the folder has something in it.
    """
    folder = Path(folder)
    check_new(folder, what)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file such that a killed process leaves the old one or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)


def named_folder(value: str) -> tuple[str, str]:
    """Name and folder of `NAME=DIR`; the name is empty for a folder without one.

    >>> named_folder("lora=runs/lora"), named_folder("runs/lr/lr=1e-3")
    (('lora', 'runs/lora'), ('', 'runs/lr/lr=1e-3'))
    """
    name, equals, folder = value.partition("=")
    named = equals and "/" not in name and not Path(value).is_dir()
    return (name, folder) if named else ("", value)
