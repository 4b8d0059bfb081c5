"""What a run says while it goes on."""

import sys

import pytest

from moresjax.training import metrics
from moresjax.training.metrics import ProgressBar


@pytest.fixture
def lines(monkeypatch, capsys):
    """The steps at which a run of steps wrote a line, were it outside a terminal."""

    def lines(steps: int, log_every: int, seconds: float, active: bool = True):
        now = [0.0]
        monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
        bar = ProgressBar(steps, 0, "run", active=active)
        for step in range(1, steps + 1):
            now[0] += seconds
            bar.update(step, {"loss": 1.0}, logged=step % log_every == 0)
        bar.close()
        written = capsys.readouterr().err.splitlines()
        return [int(x.split()[1].split("/")[0]) for x in written if x.startswith("run: ")]

    return lines


def test_every_logged_step_of_a_slow_run(lines):
    assert lines(steps=100, log_every=20, seconds=1.0) == [20, 40, 60, 80, 100]


def test_a_quick_run_is_not_flooded(lines):
    assert lines(steps=100, log_every=1, seconds=0.5) == [20, 40, 60, 80, 100]
    assert lines(steps=100, log_every=1, seconds=0.01) == [100]


def test_steps_that_are_never_logged_are_not_silent(lines):
    assert lines(steps=5197, log_every=10_000, seconds=0.5) == [*range(120, 5197, 120), 5197]


def test_only_one_process_speaks(lines):
    assert lines(steps=10, log_every=1, seconds=20.0, active=False) == []
