"""`moresjax sweep`: which runs there are, what they say together, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from run_helpers import (
    DIGITS,
    HEAD,
    assert_equal_weights,
    assert_same_bits,
    config_of,
    rewind,
)
from scipy import stats

from moresjax.cli import main
from moresjax.studies.sweep import parse_grid, sweep_runs, table
from moresjax.training.loop import train

LLM = f"{DIGITS}:stage=llm"


def arguments(workdir, *more, **changes):
    settings = [f"--config.{key}={value}" for key, value in (HEAD | changes).items()]
    return ["sweep", "--config", LLM, "--workdir", str(workdir), *more, *settings]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over two learning rates, one of which diverges, and two seeds."""
    workdir = tmp_path_factory.mktemp("sweep") / "runs"
    grid = ["--grid", "optimizer.lr=3e-2;1e38"]
    assert main(arguments(workdir, *grid, "--seeds", "2", "--at-once", "1")) == 0
    return workdir, json.loads((workdir / "sweep.json").read_text())


def test_a_run_that_diverges_ends_alone(swept):
    workdir, summary = swept
    assert [run["state"] for run in summary["runs"]] == ["done", "done", "diverged", "diverged"]
    for run in summary["runs"]:
        assert (workdir / run["name"] / "config.json").is_file()
        assert (workdir / run["name"] / "train.json").is_file() == (run["state"] == "done")
    assert "not finite at step" in summary["runs"][2]["message"]
    text = table(summary)
    assert "0 of 2" in text
    assert "an interval needs two runs that are done" in text


def test_a_cell_has_the_t_interval_over_its_seeds(swept):
    runs, (cell, failed) = swept[1]["runs"], swept[1]["cells"]
    losses = [run["metrics"]["loss"] for run in runs[:2]]
    assert losses[0] != losses[1]
    wanted = stats.t.interval(0.95, 1, loc=np.mean(losses), scale=stats.sem(losses))
    assert cell["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert cell["loss"]["interval95"] == pytest.approx(wanted)
    assert failed == {"values": {"optimizer.lr": "1e38"}, "done": 0, "of": 2}


def test_a_run_of_a_sweep_goes_on_as_an_ordinary_run(swept, tmp_path):
    workdir = shutil.copytree(swept[0] / "lr=3e-2_seed=1", tmp_path / "run")
    settings = HEAD | {"optimizer.lr": 3e-2, "seed": 1, "steps": 6, "optimizer.schedule": "cosine"}
    assert train(config_of("stage=llm", settings), workdir).step == 6


def test_more_seeds_are_added_to_a_sweep(swept, tmp_path, capsys, caplog):
    workdir = shutil.copytree(swept[0], tmp_path / "runs")
    before = (workdir / "lr=3e-2_seed=0" / "metrics.jsonl").read_bytes()
    assert main(arguments(workdir, "--grid", "optimizer.lr=3e-2", "--seeds", "3")) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert "1 program for 1 run" in caplog.messages  # the others are done
    assert (workdir / "lr=3e-2_seed=0" / "metrics.jsonl").read_bytes() == before


def test_a_killed_sweep_resumes_to_the_same_weights(tmp_path):
    workdir, settings = tmp_path / "killed", {"steps": 24, "checkpoint.every": 4}
    command = arguments(workdir, "--seeds", "2", "--at-once", "2", **settings)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device" not in f]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}  # one device: two runs at a time
    saved = [workdir / f"seed={seed}" / "checkpoints" for seed in (0, 1)]
    with open(tmp_path / "log", "w") as log:
        options = {"env": env, "stdout": log, "stderr": log}
        process = subprocess.Popen([sys.executable, "-m", "moresjax.cli", *command], **options)
        while not any(list(folder.glob("[1-9]*")) for folder in saved):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not list(workdir.glob("*/train.json"))
    states = [run["state"] for run in json.loads((workdir / "sweep.json").read_text())["runs"]]
    assert states == ["waiting", "waiting"]

    assert main(command) == 0
    train(config_of("stage=llm", HEAD | settings | {"seed": 1}), tmp_path / "alone")
    assert_equal_weights(workdir / "seed=1", tmp_path / "alone")  # sums of one device and of eight
    lines = (workdir / "seed=1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(4, 25, 4))


def test_a_sweep_that_goes_on_has_the_bits_of_runs_alone(tmp_path):
    workdir, settings = tmp_path / "runs", {"steps": 8, "checkpoint.every": 4}
    command = arguments(workdir, "--seeds", "2", **settings)
    assert main(command) == 0
    for seed in (0, 1):
        rewind(workdir / f"seed={seed}", 4)
    assert main(command) == 0
    for seed in (0, 1):
        alone = tmp_path / f"alone-{seed}"
        train(config_of("stage=llm", HEAD | settings | {"seed": seed}), alone)
        assert_same_bits(workdir / f"seed={seed}", alone)


# ---- Which runs there are.


def test_a_grid_has_every_combination_with_every_seed():
    grid = parse_grid(["optimizer.lr=1e-3;3e-3", "tuning=[lora:targets=q;v];ia3"])
    runs = sweep_runs(LLM, grid, 2, ["seed=5"])
    assert len(runs) == len({run.name for run in runs}) == 8
    assert runs[-1].config.tuning == "ia3"
    assert (runs[-1].config.seed, runs[-1].config.optimizer.lr) == (6, 3e-3)
    assert runs[0].name == "lr=1e-3_tuning=lora-targets=q-v_seed=5"


def test_paths_start_from_the_sweep_and_may_name_the_seed():
    over = ["init.llm=../llm/seed={seed}"]
    first, second = sweep_runs(f"{DIGITS}:stage=pretrain", {}, 2, over)
    assert first.config.init.llm == "../../llm/seed=0"
    assert second.config.init.llm == "../../llm/seed=1"
    assert second.config.init.vision == "../../vit"
    assert second.config.tokenizer == "digits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "optimizer.rate=1;2"], "unknown config key 'optimizer.rate'"),
        (["--grid", "optimizer.lr=fast"], "optimizer.lr takes a value of type float"),
        (["--grid", "optimizer.lr=-1"], "optimizer.lr must be above 0"),
        (["--grid", "optimizer.lr"], "not of the form KEY=A;B"),
        (["--grid", "seed=1", "--grid", "seed=2"], "grid key seed is given twice"),
        (["--grid", "seed=1;2", "--seeds", "2"], "both say the seeds"),
        (["--grid", "optimizer.lr=1e-3;0.001"], "lr=1e-3 and lr=0.001 of the grid are the same"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--seeds", "2", "--at-once", "-1"], "at_once must be at least 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(options, message, tmp_path, capsys):
    assert main(arguments(tmp_path / "runs", *options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_the_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(arguments(tmp_path, "--seeds", "2")) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
