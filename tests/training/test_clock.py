"""Saves by the clock, and what a run says when a step does not come."""

import logging
import threading

import pytest
from run_helpers import HEAD, config_of

from moresjax.training import clock
from moresjax.training.clock import AHEAD, SaveTimer, Watchdog
from moresjax.training.loop import train


class Store(dict):
    """The key-value store of several processes, as far as it is used."""

    def key_value_set(self, key, value):
        assert key not in self
        self[key] = value

    def key_value_try_get(self, key):
        return self[key]


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand."""
    seconds = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: seconds[0])
    return seconds


def test_processes_save_at_the_same_steps_by_the_clock_of_the_first(now):
    store = Store()
    timers = [SaveTimer(1.0, store, number) for number in range(3)]
    saves = [[], [], []]
    for step in range(1, 101):
        now[0] += 3.0
        # The last process asks before the first one, whose announcement it sees a step later.
        for number in (2, 0, 1):
            if timers[number].due(step):
                saves[number].append(step)
    assert saves[0] == saves[1] == saves[2]
    # A minute is 20 steps; it is counted from the last save.
    assert saves[0] == [20 + AHEAD, 48 + AHEAD, 76 + AHEAD][: len(saves[0])]
    assert len(saves[0]) == 3


def test_a_process_alone_saves_when_it_is_time(now):
    timer, never = SaveTimer(0.5), SaveTimer(0.0)
    found = []
    for step in range(1, 31):
        now[0] += 4.0
        assert not never.due(step)
        if timer.due(step):
            found.append(step)
    assert found == [8, 16, 24]


def test_a_run_saves_by_the_clock_beside_its_steps(tmp_path):
    settings = {"checkpoint.every": 3, "checkpoint.minutes": 1e-9, "checkpoint.keep": 9}
    train(config_of("stage=llm", HEAD | settings), tmp_path)
    saved = {int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")}
    assert saved == set(range(1, HEAD["steps"] + 1))


def test_a_step_that_does_not_come_is_told_once_with_the_place_of_every_thread(caplog, capfd):
    with caplog.at_level(logging.WARNING):
        watchdog, told = Watchdog(0.02, 6), threading.Event()
        for _ in range(500):
            if caplog.records and "wait" in capfd.readouterr().err:
                break
            told.wait(0.02)
        else:
            pytest.fail("nothing was told")
        told.wait(0.1)
        watchdog.close()
    assert [record.getMessage().split(" for ")[0] for record in caplog.records] == [
        "step 7 has not come"
    ]
