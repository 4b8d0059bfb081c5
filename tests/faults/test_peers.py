"""Several processes of a run: whoever fails or dies is told by every survivor, which ends.

The sample watches a store in memory; `--all-faults` has real processes.
"""

import queue
import signal
import subprocess
import sys
import threading
import time

import pytest
from run_helpers import HEAD, cli_arguments, curve, free_address, start

from moresjax.sharding import peers
from moresjax.sharding.peers import Peers


class Store:
    """The key-value store of a coordination service; without one a call does not come back."""

    def __init__(self) -> None:
        self.values, self.there = {}, threading.Event()
        self.there.set()

    def key_value_set(self, key: str, value: str, overwrite: bool) -> None:
        assert overwrite
        self.there.wait()
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        self.there.wait()
        return [(k, v) for k, v in list(self.values.items()) if k.startswith(key)]


@pytest.fixture
def watch(monkeypatch):
    """Makes watchers of one store that beat quickly; their last words are in queues."""
    monkeypatch.setattr(peers, "_BEAT", 0.01)
    monkeypatch.setattr(peers, "_HEARD", 0.2)
    store, made = Store(), []

    def make(number: int, count: int = 3, seconds: float = 0.5) -> tuple[Peers, queue.Queue]:
        ends = queue.Queue()
        made.append(Peers(store, number, count, seconds, ends.put))
        return made[-1], ends

    yield make, store
    for one in made:
        one._over = True
    store.there.set()


def test_an_error_of_one_is_told_by_all_others(watch):
    make, _ = watch
    (one, own), *others = [make(number, seconds=60.0) for number in (1, 0, 2)]
    one.fail("sample 7: no image")
    for _, ends in others:
        told = ends.get(timeout=60)
        assert told == "process 1 has ended, and this one ends, too: sample 7: no image"
    assert own.empty()


def test_a_process_that_shows_no_sign_of_life_is_missed_and_one_that_has_ended_is_not(watch):
    make, _ = watch
    killed, _ = make(2)
    finished, _ = make(1)
    _, ends = make(0)
    finished.done()
    finished._over = killed._over = True
    assert ends.get(timeout=60).startswith("process 2 has shown no sign of life for ")


def test_a_process_that_never_showed_a_sign_is_missed(watch):
    _, ends = watch[0](0, count=2)
    assert ends.get(timeout=60).startswith("process 1 has shown no sign of life for ")


def test_process_0_is_missed_when_its_store_does_not_answer(watch):
    make, store = watch
    make(0, count=2)
    _, ends = make(1, count=2)
    time.sleep(0.1)
    store.there.clear()
    assert ends.get(timeout=60).startswith("process 0 has shown no sign of life for ")


def real(workdir, count: int, **settings) -> list[subprocess.Popen]:
    address, run = free_address(), [sys.executable, "-m", "moresjax.cli"]
    steps = HEAD | {"steps": 100_000, "log_every": 1} | settings
    return [
        start(
            [
                *run,
                *cli_arguments("stage=llm", workdir, steps | ({"mesh.data": 3} if n == 3 else {})),
                *("--distributed", f"{address},{count},{n}"),
            ]
        )
        for n in range(count)
    ]


def survivors(processes, gone: int = -1) -> list[str]:
    errors = []
    for number, process in enumerate(processes):
        _, error = process.communicate(timeout=120)
        if number != gone:
            assert process.returncode == 2, error
            lines = [x for x in error.splitlines() if x.startswith("moresjax: error: ")]
            assert len(lines) == 1, error
            errors += lines
    return errors


@pytest.mark.all_faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("gone", [0, 1])
def test_real_processes_miss_a_killed_one_and_a_stopped_one(gone, number, tmp_path):
    processes, log = real(tmp_path, 2), tmp_path / "metrics.jsonl"
    while not log.is_file() or len(curve(tmp_path, "loss")) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[gone].send_signal(number)
    (told,) = survivors(processes[1 - gone :: 2] if gone else processes[1:])
    assert f"process {gone} " in told
    processes[gone].kill()


@pytest.mark.all_faults
def test_real_processes_tell_the_error_of_one(tmp_path):
    told = survivors(real(tmp_path, 4))
    assert all("mesh data=3" in line for line in told), told


@pytest.mark.all_faults
@pytest.mark.parametrize("number", [0, 1])
def test_a_real_process_whose_peer_never_comes(number, tmp_path):
    processes = real(tmp_path, 2)
    processes[1 - number].kill()
    (told,) = survivors([processes[number]])
    assert "did not come within 20 seconds" in told
