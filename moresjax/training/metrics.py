"""Where training metrics go: a JSON-lines file, TensorBoard, and a progress bar."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

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
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        done: int = 0,
        tensorboard: bool = True,
        active: bool = True,
    ) -> None:
        self._file: TextIO | None = None
        self._board: Any = None  # of tensorboardX, which is imported where it is used
        if not active:
            return
        path = Path(directory) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # A killed process may leave half a line.
        whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            board = str(Path(directory) / "tensorboard")
            self._board = _summary_writer()(board, purge_step=done + 1 if done else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        if not self._file:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


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
