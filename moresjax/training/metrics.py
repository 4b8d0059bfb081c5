"""Where training metrics go: a JSON-lines file, TensorBoard, and a progress bar."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moresjax.core.folders import set_aside
from moresjax.core.json_files import append_log, scan_log, write_log

logger = logging.getLogger(__name__)

# Outside a terminal: time between lines about logged steps, and the longest time without a line.
LINE_SECONDS = 10
SILENT_SECONDS = 60


class MetricWriter:
    """Writes `metrics.jsonl` and TensorBoard events into a run's directory.

    Args:
      directory: the run's directory.
      done: steps that the run goes on from; what an interrupted run wrote beyond them is dropped.
      tensorboard: whether to write TensorBoard events.
      active: False for all but one of the processes of a run: nothing is written.

    Attributes:
      last: The newest values of the steps that the run goes on from, by name.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        done: int = 0,
        tensorboard: bool = True,
        active: bool = True,
    ) -> None:
        self._path = Path(directory) / "metrics.jsonl" if active else None
        self._board: Any = None  # of tensorboardX, which is imported where it is used
        self.last: dict[str, float] = {}
        if self._path is None:
            return
        for row in (rows := _logged(self._path, done)):
            self.last |= {name: value for name, value in row.items() if name != "step"}
        write_log(self._path, rows)
        if tensorboard:
            board = str(Path(directory) / "tensorboard")
            self._board = _summary_writer()(board, purge_step=done + 1 if done else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        if self._path is None:
            return
        append_log(self._path, {"step": step, **values})
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._board:
            self._board.close()


def _logged(path: Path, done: int) -> list[dict[str, Any]]:
    """The lines of a log up to a step. One with a damaged line is set aside, and told of."""
    rows, damaged = scan_log(path)
    whole = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if lost := len(damaged) + len(rows) - len(whole):
        logger.warning("%d lines of %s are damaged; it is kept as %s", lost, path, set_aside(path))
    return [row for row in whole if row["step"] <= done]


def _summary_writer() -> Callable[..., Any]:
    """The class of `tensorboardX`, imported without torch, which takes seconds and is not used."""
    modules: dict[str, Any] = sys.modules
    without = "torch" not in modules
    if without:
        modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if without:
            del modules["torch"]
    return SummaryWriter


class ProgressBar:
    """A progress bar on a terminal; elsewhere a line now and then.

    A line is written when a logged step ends, `LINE_SECONDS` after the line before at the earliest,
    or when any step ends and the line before is `SILENT_SECONDS` old, and at the end.
    """

    def __init__(
        self, total: int, done: int, title: str, *, active: bool = True, bar: bool = True
    ) -> None:
        self._terminal = sys.stderr.isatty() and active and bar
        self._title, self._total, self._active = title, total, active
        self._bar = tqdm(total=total, initial=done, desc=title, disable=not self._terminal)
        self._start, self._first = time.monotonic(), done
        self._last = self._start

    def update(self, step: int, values: Mapping[str, float], *, logged: bool) -> None:
        """Shows that a step has ended, with its values if it is a logged one."""
        self._bar.update(step - self._bar.n if self._terminal else 0)
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._terminal and logged:
            self._bar.set_postfix_str(text)
        now = time.monotonic()
        due = now - self._last >= (LINE_SECONDS if logged else SILENT_SECONDS)
        if not self._terminal and self._active and (due or step == self._total):
            self._last = now
            rate = (step - self._first) / max(now - self._start, 1e-9)
            print(f"{self._title}: {step}/{self._total} {text} ({rate:.1f}/s)", file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
