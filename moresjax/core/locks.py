"""One writer per folder: a lock that says who holds it, taken over when that process is gone."""

import atexit
import contextlib
import fcntl
import functools
import inspect
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moresjax.core.errors import UserError
from moresjax.core.folders import LOCK, explain_disk, make_folder, partial_name, remove_partial

P = ParamSpec("P")
T = TypeVar("T")

# The folders that this process holds, and the threads that do.
_held: dict[Path, int] = {}
_guard = threading.Lock()


class FolderLock:
    """The right to write into a folder, until it is closed or the process ends.

    The lock is a file in the folder with the host, the process's id and its start. Of a process
    that was killed it stays and is taken over by the next one on that host. What such a process
    left unfinished is removed then.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with FolderLock(folder):
    ...     sorted(json.loads((folder / LOCK).read_text()))
    ['host', 'process', 'started']

    Args:
      folder: The folder. Where it is not there it is made, and removed again if nothing is written
        into it.

    Raises:
      UserError: Another process, or another thread of this one, writes into the folder, or it
        cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        place = Path(folder).absolute()
        self._made = [path for path in (place, *place.parents) if not os.path.exists(path)]
        self._folder = make_folder(place).resolve()
        self._file, own = self._folder / LOCK, _identity(os.getpid())
        with _guard, _one_at_a_time(self._folder), explain_disk(self._folder):
            while not _created(self._file, own):
                holder = _holder(self._file)
                if holder is None:
                    continue  # it was let go of meanwhile
                if self._folder in _held or not _is_gone(holder, own):
                    raise UserError(_in_use(self._folder, holder, own))
                self._file.unlink(missing_ok=True)
            remove_partial(self._folder)
            _held[self._folder] = threading.get_ident()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write."""
        with _guard:
            if _held.pop(self._folder, None) is not None:
                with contextlib.suppress(OSError):
                    self._file.unlink(missing_ok=True)
                    for path in self._made:
                        path.rmdir()  # unless it holds something


@contextlib.contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Holds the lock of a folder, unless there is none or this thread holds it already.

    Raises:
      UserError: Another process writes into the folder.
    """
    if folder is None or _held.get(Path(folder).resolve()) == threading.get_ident():
        yield
        return
    with FolderLock(folder):
        yield


def one_writer(function: Callable[P, T]) -> Callable[P, T]:
    """Lets a function hold the lock of the folder that its argument `out` names.

    Of several processes of one program the first one does.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        import jax  # takes a second; a lock alone needs none

        out = signature.bind(*args, **kwargs).arguments.get("out")
        with locked(None if jax.process_index() else out):
            return function(*args, **kwargs)

    return alone


@atexit.register
def release_all() -> None:
    """Removes the locks of a process that ends by an error."""
    for folder in list(_held):
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps processes of this host from taking over a lock at the same time."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems know no locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _identity(process: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": process, "started": _started(process)}


def _started(process: int) -> str:
    """When a process started, as a text that no other process of its id has; empty without one."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name of the program is in brackets and may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return f"{boot} {fields[19]}" if fields[0] not in "ZX" else ""
    if Path("/proc/self/stat").exists():
        return ""
    command = ["ps", "-o", "lstart=", "-p", str(process)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _created(file: Path, content: dict[str, Any]) -> bool:
    """Whether the lock could be made; it is there with all of its content or not at all."""
    fresh = partial_name(file)
    try:
        fresh.write_text(json.dumps(content) + "\n")
        os.link(fresh, file)
    except FileExistsError:
        return False
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _holder(file: Path) -> dict[str, Any] | None:
    """What a lock says; None when it is gone."""
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _is_gone(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the process that holds a lock is known to have ended."""
    process = holder.get("process")
    if holder.get("host") != own["host"] or not isinstance(process, int):
        return False
    return _started(process) != holder.get("started")


def _in_use(folder: Path, holder: dict[str, Any], own: dict[str, Any]) -> str:
    who = f"process {holder.get('process', '?')}"
    if holder.get("host") == own["host"]:
        return f"{folder} is being written to by {who}; wait for it, or name another folder"
    host = str(holder.get("host", "an unknown host"))[:80]
    return (
        f"{folder} is being written to by {who} on {host}; if that process has ended, remove "
        f"{folder / LOCK} and give the same command again"
    )
