"""Whole training runs: they learn, resume exactly, and refuse what they should."""

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import clean_environment
from flax import nnx
from run_helpers import (
    HEAD,
    MEASURED,
    TEXT_ONLY,
    TINY,
    assert_equal_weights,
    cli_arguments,
    config_of,
    logged,
    rewind,
    start,
    wait_for,
)

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import SPECIAL, DigitsSource
from moresjax.data.images import ImageProcessor
from moresjax.data.sources import SOURCES
from moresjax.models.count import count_parameters
from moresjax.models.initialize import set_params
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints, named
from moresjax.runs.config import read_config
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.workdir import load_workdir
from moresjax.training import prepare
from moresjax.training.loop import train
from moresjax.training.metrics import MetricWriter
from moresjax.training.objectives import OBJECTIVES, next_token
from moresjax.training.optimizer import make_schedule


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- Learning.


def test_a_short_run_learns_real_digits(tmp_path, run_moresjax):
    settings = {"steps": 100, "log_every": 20, "tensorboard": False}
    done = run_moresjax(*cli_arguments("stage=vit", tmp_path / "vit", settings))
    assert done.returncode == 0, done.stderr
    lines = logged(tmp_path / "vit")
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]

    # Handwriting that no training scene shows.
    model = build_model(read_config(tmp_path / "vit" / "config.json"))
    set_params(model, trained_parameters(tmp_path / "vit"), "vit")
    source, image = DigitsSource("patches", split="test"), ImageProcessor(32)
    rows = [source[i] for i in range(64)]
    digits, cells = model(jnp.stack([image(row["pixels"]) for row in rows]))
    labels = np.stack([row["classes"] for row in rows])
    assert (digits.argmax(-1) == labels[..., 0]).mean() > 0.35  # chance: 0.1
    assert (cells.argmax(-1) == labels[..., 1]).mean() > 0.9  # chance: 0.25


# ---- Resuming.

KILLED = {
    "llm": ("stage=llm", TEXT_ONLY),
    "finetune": (
        "stage=finetune,tuning=mores:rank=1,positions=image/lora:rank=2,dropout=0.3,targets=q",
        TINY,
    ),
}


# Two commands, one after the other, in one process, which imports and compiles once.
BOTH = """
import sys
from moresjax.cli import main
cut = sys.argv.index("--")
sys.exit(main(sys.argv[1:cut]) or main(sys.argv[cut + 1 :]))
"""


def run_and_kill(first: list[str], second: list[str], workdir: Path, step: int) -> None:
    """Runs the first command, and kills the second when its checkpoint of `step` is there."""
    command = [sys.executable, "-c", BOTH, *first, "--", *second]
    log = workdir.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=clean_environment(), stdout=file, stderr=file)
        while not any((workdir / "checkpoints" / str(s)).is_dir() for s in (step, step + 4)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()


@pytest.mark.parametrize("stage", KILLED)
def test_a_killed_run_resumes_to_the_same_weights(stage, tmp_path):
    arg, settings = KILLED[stage]
    settings = settings | {"steps": 40, "log_every": 4, "checkpoint.every": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    again = cli_arguments(arg, killed, settings)
    run_and_kill(cli_arguments(arg, whole, settings), again, killed, 8)
    assert (whole / "train.json").exists()
    assert not (killed / "train.json").exists()
    folders = (killed / "checkpoints").iterdir()
    started_again_at = max(int(p.name) for p in folders if p.name.isdigit())
    assert 8 <= started_again_at < 40
    wait_for(start([sys.executable, "-m", "moresjax.cli", *again]))

    assert_equal_weights(killed, whole)
    lines = {line["step"]: line for line in logged(whole)}
    assert list(lines) == list(range(4, 41, 4))
    assert [line["step"] for line in logged(killed)] == list(lines)
    for line in logged(killed):
        wanted = lines[line["step"]]
        same = set(wanted) - MEASURED
        assert same <= set(line)
        assert {k: line[k] for k in same} == pytest.approx({k: wanted[k] for k in same}, abs=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run with checkpoints of steps 2 and 4; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(config_of("stage=llm", HEAD | {"checkpoint.every": 2}), workdir)
    return workdir


def head_config(**changes):
    return config_of("stage=llm", HEAD | {"checkpoint.every": 2} | changes)


def compilations(caplog) -> int:
    """How often a train step was compiled."""
    texts = [record.getMessage() for record in caplog.records]
    return sum(text.startswith("Finished XLA compilation of jit(step)") for text in texts)


def test_a_resumed_run_compiles_its_step_once(finished, tmp_path, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    rewind(workdir, 2)
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        assert train(head_config(), workdir).step == 4
    assert_equal_weights(workdir, finished)
    assert compilations(caplog) == 1


def test_a_new_run_compiles_its_step_once(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        train(head_config(), tmp_path / "run")
    assert compilations(caplog) == 1


def test_a_run_recovers_from_a_damaged_last_checkpoint(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "train.json").unlink()
    for path in (workdir / "checkpoints" / "4" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-8])
    assert train(head_config(), workdir).step == 4
    checkpoints = Checkpoints(workdir / "checkpoints")
    step, _ = checkpoints.restore_parameters()
    checkpoints.close()
    assert step == 4
    assert_equal_weights(workdir, finished)


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    before = contents(finished)
    monkeypatch.setattr(
        prepare, "build_model", lambda *_, **__: pytest.fail("it was started again")
    )
    result = train(head_config(), finished)
    assert result.step == 4
    assert result.metrics["loss"] == logged(finished)[-1]["loss"]
    assert contents(finished) == before


def test_what_does_not_change_the_numbers_may_change(finished):
    changes = {"name": "other", "log_every": 1, "checkpoint.keep": 5, "tensorboard": True}
    assert train(head_config(**changes), finished).step == 4


def test_the_directory_of_another_run_is_refused(finished):
    before = contents(finished)
    with pytest.raises(UserError, match=r"max_seq_len, optimizer\.lr") as error:
        train(head_config(**{"optimizer.lr": 0.5, "max_seq_len": 70}), finished)
    assert str(finished) in str(error.value)
    assert contents(finished) == before


def test_a_run_that_never_saved_anything_may_be_started_differently(tmp_path):
    with pytest.raises(UserError, match="do not fit"):
        train(head_config(max_seq_len=5), tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert train(head_config(), tmp_path).step == 4


def test_the_folder_of_a_model_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"not a run's configuration|other settings"):
        train(head_config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        train(head_config(), tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_object_store_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs:/bucket/run is in an object store"):
        train(head_config(), "gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_never_resuming_wants_an_empty_directory(finished):
    before = contents(finished)
    with pytest.raises(UserError, match="not empty"):
        train(head_config(), finished, resume="never")
    with pytest.raises(UserError, match="auto, never"):
        train(head_config(), finished, resume="maybe")
    assert contents(finished) == before


def test_never_resuming_on_the_command_line(tmp_path, capsys):
    (tmp_path / "notes").write_text("")
    assert main([*cli_arguments("stage=llm", tmp_path, HEAD), "--resume", "never"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moresjax: error: ")
    assert "--resume" in error
    assert "Traceback" not in error


# ---- Metrics.


def test_every_line_is_about_its_own_step(tmp_path):
    config = head_config(log_every=1)
    train(config, tmp_path)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    o = config.optimizer
    schedule = make_schedule(o.schedule, o.lr, config.steps, o.warmup, o.end)
    wanted = [float(schedule(step)) for step in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(wanted)


def test_lines_beyond_the_resumed_step_are_dropped(tmp_path):
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = MetricWriter(tmp_path, done=1)
    writer.write(2, {"loss": 0.5})
    writer.close()
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(1, 2.0), (2, 0.5)]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


# ---- The frozen part.


def test_a_checkpoint_holds_what_trains_and_the_rest_never_changes(tmp_path):
    settings = TINY | {"steps": 3, "checkpoint.every": 3, "log_every": 3}
    config = config_of("stage=finetune,tuning=mores:rank=1,positions=all", settings)
    train(config, tmp_path)
    saved = trained_parameters(tmp_path)
    params = {f"tuning.params.mores.llm.block.out.{x}" for x in ("rotate", "weight", "bias")}
    connector = {f"connector.layers.{i}.{x}" for i in (0, 1) for x in ("kernel", "bias")}
    assert set(saved) == params | connector

    model, _ = load_workdir(tmp_path)
    report = count_parameters(model.config, config.tuning, tuple(config.also_train))
    assert sum(array.nbytes for array in saved.values()) == 4 * report.trainable
    start = named(nnx.state(build_model(config), nnx.Param))
    end = named(nnx.state(model, nnx.Param))
    assert set(start) == set(end)
    same = {name for name in start if np.array_equal(start[name], end[name])}
    assert same == set(start) - set(saved)


# ---- A loss that is not finite.

POISON = 5


@dataclasses.dataclass(frozen=True)
class PoisonedSource(DigitsSource):
    """Digits, one sample of which has a word that the tokenizer does not know."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == POISON:
            sample = dataclasses.replace(sample, context="poison " + sample.context)
        return sample


def poisoned(model, batch, key=None):
    """`next_token`, but not a number for a batch with an unknown word."""
    loss = next_token(model, batch, key)
    bad = (jnp.asarray(batch.tokens) == SPECIAL.index("<unk>")).any()
    return dataclasses.replace(loss, total=loss.total * jnp.where(bad, jnp.nan, 1.0))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The directory and the error of a run that meets a poisoned sample."""
    workdir = tmp_path_factory.mktemp("runs") / "broken"
    changes = {"steps": 8, "checkpoint.every": 1, "max_seq_len": 64, "data.size": 24}
    config = head_config(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "digits", PoisonedSource)
        patch.setitem(OBJECTIVES, "next_token", poisoned)
        with pytest.raises(UserError) as error:
            train(config, workdir)
    return workdir, str(error.value)


def test_a_loss_that_is_not_finite_names_the_samples(broken):
    workdir, message = broken
    [file] = workdir.glob("non_finite*.json")
    assert "nan" in message
    assert str(file) in message
    report = json.loads(file.read_text())
    assert f"step {report['step']}" in message
    assert len(set(report["samples"])) == 8
    assert f"digits-text-0-{POISON}" in report["samples"]
    assert not (workdir / "train.json").exists()


def test_no_checkpoint_is_written_from_a_step_that_went_wrong(broken):
    workdir, _ = broken
    [file] = workdir.glob("non_finite*.json")
    failed = json.loads(file.read_text())["step"]
    assert failed > 1  # a good step comes first
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    assert saved
    assert saved[-1] < failed
    for name, array in trained_parameters(workdir).items():
        assert np.isfinite(array).all(), name


# ---- Settings that cannot run.


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 12), ("microbatches", 3), ("log_every", 0), ("checkpoint.every", 0)],
)
def test_numbers_that_cannot_run_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(UserError, match=key):
        train(head_config(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
