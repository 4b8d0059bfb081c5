"""Runs in real processes: two that train together, and one that is asked to stop."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import clean_environment
from runs import TINY, cli_arguments, rewind

from moresjax.build import trained_parameters
from moresjax.cli import main

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
    return subprocess.Popen(arguments, env=clean_environment(), **pipes)


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


def test_two_processes_train_as_one(tmp_path, pytestconfig):
    root = pytestconfig.rootpath
    address = free_address()
    together = [
        start(command(root, tmp_path / "both", "--distributed", f"{address},2,{number}", steps=6))
        for number in range(2)
    ]
    wait_for(*together, start(command(root, tmp_path / "one", steps=6)))
    assert len(losses(tmp_path / "one")) == 6
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "one"), atol=1e-4)
    ours, theirs = (trained_parameters(tmp_path / name) for name in ("both", "one"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-4)


def test_another_number_of_processes_goes_on_with_a_run(tmp_path):
    """Begun by two and ended by one, and the other way round: the curves of a run by one alone."""
    settings = TINY | {"steps": 6, "log_every": 1, "checkpoint.every": 3}
    settings |= {"validation.share": 0.1, "validation.every": 3, "data.size": 210}
    settings |= {"probe_every": 3}
    arg = "stage=finetune,tuning=mores:rank=1,positions=image/lora:rank=2"

    def two_processes(workdir) -> list[subprocess.Popen]:
        python, where = [sys.executable, "-m", "moresjax.cli"], free_address()
        arguments = cli_arguments(arg, workdir, settings)
        return [
            start([*python, *arguments, "--distributed", f"{where},2,{number}"])
            for number in range(2)
        ]

    one, two, ended_by_one, ended_by_two = (tmp_path / n for n in ("one", "two", "1", "2"))
    begun = two_processes(two)
    assert main(cli_arguments(arg, one, settings)) == 0
    shutil.copytree(one, ended_by_two)
    rewind(ended_by_two, 3)
    wait_for(*begun)
    shutil.copytree(two, ended_by_one)
    rewind(ended_by_one, 3)
    ending = two_processes(ended_by_two)
    assert main(cli_arguments(arg, ended_by_one, settings)) == 0
    wait_for(*ending)

    assert len(losses(one)) == 6
    for workdir in (two, ended_by_one, ended_by_two):
        for name, count in {"loss": 6, "validation_loss": 2, "lmar": 2}.items():
            assert len(curve(workdir, name)) == count
            np.testing.assert_allclose(curve(workdir, name), curve(one, name), atol=1e-4)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, pytestconfig):
    root, run = pytestconfig.rootpath, tmp_path / "run"
    process = start(command(root, run, steps=100_000))
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert f"stopped at step {saved}, which is saved" in errors
    assert not (run / "train.json").exists()
    assert losses(run)[saved - 1 :] == losses(run)[-1:]

    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps": saved + 2}))
    assert main(command(root, run, steps=saved + 2)[3:]) == 0
    assert len(losses(run)) == saved + 2


@pytest.mark.parametrize("where", ["somewhere", "127.0.0.1:1,2"])
def test_processes_that_cannot_be_found(where, tmp_path, pytestconfig, capsys):
    arguments = command(pytestconfig.rootpath, tmp_path / "run", "--distributed", where)
    assert main(arguments[3:]) == 2
    assert f"--distributed {where}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
