"""New folders and files that are complete or not there."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moresjax.core.errors import UserError

# Files and folders that are not finished; a name that nobody can foresee.
_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{16}")
# The file that says who writes into a folder (`locks.py`).
LOCK = ".moresjax-lock"
_ADVICE = {
    errno.ENOSPC: "free some space, or inodes, and give the same command again",
    errno.EDQUOT: "free some of your quota and give the same command again",
    errno.EFBIG: "the file may not grow that large here",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a folder that can be written",
    errno.EPERM: "name a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.ENAMETOOLONG: "choose a shorter name",
}

# A disk says so, and not the name of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def disk_sentence(error: OSError, path: str | Path) -> str:
    """One sentence about a file or folder that cannot be written, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{path} cannot be written: {error.strerror or error}" + f"; {advice}" * bool(advice)


def disk_reason(error: BaseException) -> str:
    """Why a library could not write, if a full or read-only disk is behind what it raised.

    Empty where something else is. Libraries wrap the error of the system, or tell its number or
    text.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for one in chain:
        told = re.search(r"\(os error (\d+)\)|os_error_code='(\d+)'", str(one))
        number = one.errno if isinstance(one, OSError) else told and int(told[1] or told[2])
        if not number:  # some tell only its text
            number = next((n for n in _FULL if f"failed: {os.strerror(n)}" in str(one)), None)
        if number in _FULL:
            return f"{os.strerror(number)}; {_ADVICE[number]}"
    return ""


def disk_error(error: BaseException) -> str:
    """One sentence about a disk or a file that the system refuses; empty for other errors."""
    if reason := disk_reason(error):
        name = getattr(error, "filename", None) or "the output"
        return f"{name} cannot be written: {reason}"
    if isinstance(error, OSError) and error.filename and error.errno in (*_ADVICE, errno.EIO):
        return disk_sentence(error, error.filename)
    return ""


@contextlib.contextmanager
def explain_disk(path: str | Path) -> Iterator[None]:
    """Says in one sentence that `path` cannot be written.

    Raises:
      UserError: when the system refuses what is done inside.
    """
    try:
        yield
    except OSError as error:
        raise UserError(disk_sentence(error, path)) from None


def check_writable(folder: str | Path) -> None:
    """Refuses a folder that cannot be made or written into; nothing is made.

    Raises:
      UserError: says why.
    """
    with explain_disk(folder):
        place = Path(folder).absolute()
        while not os.path.lexists(place) and place != place.parent:
            with contextlib.suppress(FileNotFoundError):
                place.stat()  # the name may be too long, or a file on its way
            place = place.parent
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            reason = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason))


def make_folder(folder: str | Path) -> Path:
    """The folder, which is made with its parents where it is not there.

    Raises:
      UserError: when it cannot be made.
    """
    folder = Path(folder)
    with explain_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_new(folder: Path, what: str) -> None:
    """Refuses to write into a folder that has something in it.

    Raises:
      UserError: that says what needs a new folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the {what} needs a new folder")
    if folder.exists() and not is_empty(folder):
        raise UserError(f"{folder} is not empty; the {what} needs a new folder")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, but for what killed processes did not finish."""
    names = (path.name for path in folder.iterdir())
    return all(name == LOCK or _PARTIAL.fullmatch(name) for name in names)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes did not finish, from a folder that nobody else writes into."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def partial_name(path: Path) -> Path:
    """A name beside `path` for what is not finished, which nobody can foresee."""
    # A name of the greatest length has no room for more.
    return path.with_name(f".{path.name[:60]}.partial-{secrets.token_hex(8)}")


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
    with explain_disk(folder):
        check_new(folder, what)
        folder = folder.resolve()
        partial = partial_name(folder)
        partial.mkdir(parents=True)
    try:
        yield partial
        with explain_disk(folder):
            for path in partial.rglob("*"):
                _sync(path, must=path.is_file())
            _sync(partial)
            if folder.is_dir():
                remove_partial(folder)
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
            partial.rename(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes that name at the end.

    A killed process or machine leaves the old file or the new one; so does an error.

    Raises:
      UserError: The file cannot be written.
    """
    target = Path(path).resolve()  # a link stays one
    fresh = partial_name(target)
    try:
        with explain_disk(path):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = (target if target.exists() else fresh).stat().st_mode & 0o7777
            yield fresh
            fresh.chmod(mode)
            _sync(fresh, must=True)
            fresh.replace(target)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()
    _sync(target.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file such that a killed process or machine leaves the old one or the new one.

    Raises:
      UserError: The file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not `path.exists()`, which raises for a name that is too long.
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        with explain_disk(path):
            path.write_bytes(data)  # a pipe or a device
        return
    with new_file(path) as file:
        file.write_bytes(data)


def set_aside(path: Path) -> Path:
    """Gives a damaged file another name, that of nothing else, and returns it."""
    target = path.with_name(f"{path.name}.damaged")
    while target.exists():
        target = target.with_name(target.name + "x")
    return path.rename(target)


def _sync(path: Path, *, must: bool = False) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    A file system may be unable to do so, which is no error unless it `must`: a disk may tell only
    now that it is full.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(number)
    except OSError as error:
        if must and error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def named_folder(value: str) -> tuple[str, str]:
    """Name and folder of `NAME=DIR`; the name is empty for a folder without one.

    >>> named_folder("lora=runs/lora"), named_folder("runs/lr/lr=1e-3")
    (('lora', 'runs/lora'), ('', 'runs/lr/lr=1e-3'))
    """
    name, equals, folder = value.partition("=")
    named = equals and "/" not in name and not Path(value).is_dir()
    return (name, folder) if named else ("", value)
