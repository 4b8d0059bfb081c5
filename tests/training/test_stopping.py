"""Runs in real processes that are asked to stop: alone, one of two, and both."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from run_helpers import TEXT_ONLY, cli_arguments, curve, free_address, start, wait_for

from moresjax.cli import main
from moresjax.runs.init_weights import trained_parameters
from moresjax.sharding.processes import PreemptionHandler

RUN = [sys.executable, "-m", "moresjax.cli"]


def arguments(workdir, steps: int, **settings) -> list[str]:
    return cli_arguments(
        "stage=llm", workdir, TEXT_ONLY | {"log_every": 1, "steps": steps} | settings
    )


def losses(workdir) -> list[float]:
    return curve(workdir, "loss")


# Steps do not depend on how many there will be.
CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup": 0.0}


def start_both(workdir, steps: int) -> list[subprocess.Popen]:
    run, address = [*RUN, *arguments(workdir, steps, **CONSTANT)], free_address()
    return [start([*run, "--distributed", f"{address},2,{number}"]) for number in range(2)]


def stop(workdir, processes, asked: list[int]) -> int:
    """Sends SIGTERM to some of a run's processes once it has gone on; the step all stopped at."""
    log = workdir / "metrics.jsonl"
    enough = 3 + (len(losses(workdir)) if log.is_file() else 0)
    while not log.is_file() or len(losses(workdir)) < enough:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for number in asked:
        processes[number].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return check_stopped(workdir, *errors)


def check_stopped(workdir, *errors: str) -> int:
    """The step that was saved, which every process says."""
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert all(f"stopped at step {saved}, which is saved" in error for error in errors), errors
    assert not (workdir / "train.json").exists()
    assert len(losses(workdir)) == saved
    return saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_and_a_second_interrupt_interrupts(number):
    before = signal.getsignal(number)
    handler = PreemptionHandler()
    try:
        assert not handler.at(1)
        signal.raise_signal(number)
        assert handler.at(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        handler.close()
    assert signal.getsignal(number) is before


def test_a_run_that_is_interrupted_saves_and_goes_on(tmp_path, monkeypatch, caplog):
    ask = PreemptionHandler.at

    def interrupted(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return ask(self, step)

    run, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionHandler, "at", interrupted)
        assert main(arguments(run, 100_000)) == 0
    saved = check_stopped(run, caplog.text)
    assert signal.getsignal(signal.SIGINT) is handler
    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps": saved + 2}))
    assert main(arguments(run, saved + 2)) == 0
    assert len(losses(run)) == saved + 2


def test_processes_stop_at_one_step_whichever_of_them_are_asked(tmp_path):
    run = tmp_path / "run"
    first = stop(run, start_both(run, 100_000), [1])
    last = stop(run, start_both(run, 100_000), [0, 1])
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {first, last}

    wait_for(*start_both(tmp_path / "whole", last))
    ours, theirs = trained_parameters(run), trained_parameters(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    assert losses(run) == losses(tmp_path / "whole")
