"""Two real processes that train together, and what any process keeps and refuses."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from run_helpers import TINY, cli_arguments, curve, free_address, rewind, start, wait_for

from moresjax.cli import main
from moresjax.runs.init_weights import trained_parameters
from moresjax.sharding.processes import use_compile_cache

# With images, packed rows, validation, attention statistics, and parameters split over processes.
WATCHED = TINY | {"steps": 6, "log_every": 1, "checkpoint.every": 3}
WATCHED |= {"validation.share": 0.1, "validation.every": 3, "data.size": 210, "lmar_every": 3}
WATCHED |= {"mesh.data": 1, "mesh.fsdp": -1}
WATCHED |= {"batching": "pack", "max_seq_len": 128, "images_per_row": 3, "pack_window": 13}
LOGGED = {"loss": 6, "samples_seen": 6, "epoch": 6, "validation_loss": 2, "lmar": 2}


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
def test_processes_that_cannot_be_found(where, tmp_path, capsys):
    arguments = cli_arguments("stage=llm", tmp_path / "run", {})
    assert main([*arguments, "--distributed", where]) == 2
    assert f"--distributed {where}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
