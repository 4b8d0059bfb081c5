"""A process that forks a child for every place where a write can be killed; it imports no jax.

    python tests/faults/kill_writes.py FOLDER [STRIDE]

A child is killed at the n-th line of Python that the write runs, or by the system in the middle of
the n-th byte that it writes (RLIMIT_FSIZE). After each the file must hold what it held, or what was
written. With a stride, every STRIDE-th place is tried. It prints how many were killed, and stops at
the first file that holds something else.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from moresjax.core.folders import is_empty, remove_partial
from moresjax.core.json_files import append_log, read_json, read_log, write_json, write_log

OLD, NEW = {"step": 1, "metrics": {"loss": 0.5}}, {"step": 12, "metrics": {"loss": 0.25, "z": 1}}


def killed(act: Callable[[], None], arm: Callable[[], None]) -> bool:
    """Whether a child that is armed before it acts is killed."""
    child = os.fork()
    if not child:
        arm()
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def at_line(number: int) -> Callable[[], None]:
    left = [number]

    def trace(frame, event, arg):
        left[0] -= event == "line"
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return lambda: sys.settrace(trace)


def at_byte(number: int) -> Callable[[], None]:
    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    return arm


def replaced(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A write of a whole file, and the look at what is there."""
    file = folder / "train.json"
    write_json(file, OLD)

    def check() -> None:
        assert read_json(file) in (OLD, NEW)

    return lambda: write_json(file, NEW), check


def first(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A write of a file that was not there."""
    file = folder / "train.json"
    file.unlink(missing_ok=True)

    def check() -> None:
        assert read_json(file) == NEW if file.exists() else is_empty(folder)

    return lambda: write_json(file, NEW), check


def appended(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A line that is added to a log."""
    file = folder / "metrics.jsonl"
    write_log(file, [OLD, OLD])

    def check() -> None:
        assert read_log(file) in ([OLD, OLD], [OLD, OLD, NEW])
        append_log(file, OLD)
        assert read_log(file) in ([OLD, OLD, OLD], [OLD, OLD, NEW, OLD])

    return lambda: append_log(file, NEW), check


def main(folder: Path, stride: int = 1) -> None:
    total = 0
    for kind in (replaced, first, appended):
        for place in (at_line, at_byte):
            number, alive = 1, False
            while not alive:
                act, check = kind(folder)
                alive = not killed(act, place(number))
                check()
                remove_partial(folder)
                number += stride
                total += not alive
        (folder / "train.json").unlink(missing_ok=True)
    print(total)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
