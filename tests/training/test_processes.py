"""Runs in real processes: two that train together, and runs that are asked to stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import clean_environment
from runs import TINY, cli_arguments, rewind

from moresjax.build import trained_parameters
from moresjax.cli import main
from moresjax.parallel.processes import use_compile_cache

DIGITS = "configs/digits.py:stage=llm"
SETTINGS = {
    "batch_size": 8,
    "log_every": 1,
    "tensorboard": False,
    "model.llm.hidden_size": 8,
    "model.llm.intermediate_size": 8,
    "model.llm.num_heads": 2,
    "model.llm.num_layers": 1,
}


def command(root, workdir, *extra: str, **settings) -> list[str]:
    values = [f"--config.{key}={value}" for key, value in (SETTINGS | settings).items()]
    train = ["train", "--config", str(root / DIGITS), "--workdir", str(workdir), *extra]
    return [sys.executable, "-m", "moresjax.cli", *train, *values]


def start(arguments: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    flags = os.environ["XLA_FLAGS"].split()  # one device, but the same quick compilation
    env = clean_environment() | {"XLA_FLAGS": " ".join(f for f in flags if "device" not in f)}
    return subprocess.Popen(arguments, env=env, **pipes)


def curve(workdir, name: str) -> list[float]:
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").open())
    return [line[name] for line in lines if name in line]


def losses(workdir) -> list[float]:
    return curve(workdir, "loss")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def wait_for(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


# With images, packed rows, validation, attention statistics, and parameters split over processes.
WATCHED = TINY | {"steps": 6, "log_every": 1, "checkpoint.every": 3}
WATCHED |= {"validation.share": 0.1, "validation.every": 3, "data.size": 210, "probe_every": 3}
WATCHED |= {"mesh.data": 1, "mesh.fsdp": -1}
WATCHED |= {"batching": "pack", "length": 128, "images": 3, "window": 13}
LOGGED = {"loss": 6, "validation_loss": 2, "lmar": 2}


def start_watched(workdir, processes: int) -> list[subprocess.Popen]:
    run = [sys.executable, "-m", "moresjax.cli"]
    run += cli_arguments("stage=finetune,tuning=full", workdir, WATCHED)
    address, several = free_address(), processes > 1
    return [
        start([*run, *(["--distributed", f"{address},{processes},{number}"] if several else [])])
        for number in range(processes)
    ]


def assert_same_curves(found, wanted) -> None:
    for name, count in LOGGED.items():
        assert len(curve(wanted, name)) == count
        np.testing.assert_allclose(curve(found, name), curve(wanted, name), atol=1e-4)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The directories of a run by one process and of the same run by two."""
    folder = tmp_path_factory.mktemp("runs")
    wait_for(*start_watched(folder / "one", 1), *start_watched(folder / "two", 2))
    return folder / "one", folder / "two"


def test_two_processes_train_as_one(one_and_two):
    one, two = one_and_two
    assert_same_curves(two, one)
    ours, theirs = trained_parameters(two), trained_parameters(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_another_number_of_processes_goes_on_with_a_run(one_and_two, processes, tmp_path):
    one, two = one_and_two
    workdir = shutil.copytree(two if processes == 1 else one, tmp_path / "run")
    rewind(workdir, 3)
    wait_for(*start_watched(workdir, processes))
    assert_same_curves(workdir, one)


# Steps do not depend on how many there will be.
CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup": 0.0}


def start_both(root, workdir, steps: int) -> list[subprocess.Popen]:
    address = free_address()
    pairs = [("--distributed", f"{address},2,{number}") for number in range(2)]
    return [start(command(root, workdir, *pair, steps=steps, **CONSTANT)) for pair in pairs]


def stop(workdir, processes: list[subprocess.Popen], asked: list[int]) -> int:
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
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert all(f"stopped at step {saved}, which is saved" in error for error in errors), errors
    assert not (workdir / "train.json").exists()
    assert len(losses(workdir)) == saved
    return saved


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, pytestconfig):
    root, run = pytestconfig.rootpath, tmp_path / "run"
    saved = stop(run, [start(command(root, run, steps=100_000))], [0])
    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps": saved + 2}))
    assert main(command(root, run, steps=saved + 2)[3:]) == 0
    assert len(losses(run)) == saved + 2


def test_processes_stop_at_one_step_whichever_of_them_are_asked(tmp_path, pytestconfig):
    root, run = pytestconfig.rootpath, tmp_path / "run"
    first = stop(run, start_both(root, run, 100_000), [1])
    last = stop(run, start_both(root, run, 100_000), [0, 1])
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {first, last}

    wait_for(*start_both(root, tmp_path / "whole", last))
    ours, theirs = trained_parameters(run), trained_parameters(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    assert losses(run) == losses(tmp_path / "whole")


def test_compiled_programs_are_kept_with_the_users_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == before  # the environment says where
        jax.config.update("jax_compilation_cache_dir", None)
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "moresjax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("where", ["somewhere", "127.0.0.1:1,2"])
def test_processes_that_cannot_be_found(where, tmp_path, pytestconfig, capsys):
    arguments = command(pytestconfig.rootpath, tmp_path / "run", "--distributed", where)
    assert main(arguments[3:]) == 2
    assert f"--distributed {where}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
