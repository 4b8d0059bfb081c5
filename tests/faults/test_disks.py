"""Disks that are full or read-only, and files in the way: one sentence, exit code 2, at once.

A limit on the size of files stands for a full disk. With `--all-faults` there are real ones: small
file systems in memory, which a user's own namespace may mount (`unshare`).
"""

import contextlib
import resource
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import clean_environment
from run_helpers import HEAD, cli_arguments, curve

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.core.folders import check_writable
from moresjax.core.json_files import append_log, read_log, write_json
from moresjax.runs.init_weights import trained_parameters

SAVES = HEAD | {"checkpoint.every": 2, "log_every": 1, "model.llm.hidden_size": 64}


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system refuses to let a file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sentence(capsys) -> str:
    """The error that the command has ended with, which is all that it says of it."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [x for x in error.splitlines() if x.startswith("moresjax: error: ")]
    return line.removeprefix("moresjax: error: ")


def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_the_run_goes_on_later(tmp_path, capsys):
    run, threads = tmp_path / "run", set(threading.enumerate())
    train = cli_arguments("stage=llm", run, SAVES)
    with files_of_at_most(6000):
        assert main(train) == 2
    told = sentence(capsys)
    assert told.startswith(f"{run / 'checkpoints'} cannot be written: File too large"), told
    assert not list((run / "checkpoints").iterdir())  # no half of one
    names = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in names if "serial" in name or "save" in name or "target" in name}
    assert main(train) == 0
    assert len(curve(run, "loss")) == 4
    assert trained_parameters(run)

    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    (run / "train.json").unlink()
    assert main(train) == 2
    assert "a file is where a folder should be" in sentence(capsys)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/run", "Not a directory; a file is where a folder should be"),
        ("file", "Not a directory; a file is where a folder should be"),
        ("n" * 300, "File name too long; choose a shorter name"),
    ],
)
def test_an_impossible_folder_of_a_run_is_told_before_anything_is_built(
    place, reason, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("moresjax.training.prepare.build_model", None)
    assert main(cli_arguments("stage=llm", tmp_path / place, HEAD)) == 2
    told = sentence(capsys)
    assert str(tmp_path / place) in told
    assert reason in told


def test_a_full_device_is_told_of_json(tmp_path):
    (tmp_path / "train.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"train\.json cannot be written: No space left"):
        write_json(tmp_path / "train.json", {"step": 1})


@pytest.mark.parametrize("size", [0, 1, 30, 4000])
def test_a_log_that_cannot_grow_keeps_its_lines(size, tmp_path):
    log, rows = tmp_path / "metrics.jsonl", []

    def grow() -> None:
        while True:
            append_log(log, {"step": len(rows)})
            rows.append({"step": len(rows)})

    with files_of_at_most(size), pytest.raises(UserError, match="File too large"):
        grow()
    assert read_log(log) == rows
    append_log(log, {"step": "later"})
    assert read_log(log) == [*rows, {"step": "later"}]


def test_a_folder_that_can_be_made_is_not_made_by_looking(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


MOUNTS = {
    "no space": ("-o size=24k", "No space left on device; free some space"),
    "no inodes": ("-o size=50m,nr_inodes=16", "No space left on device; free some space"),
    "read-only": ("-o ro", "Read-only file system; name a folder that can be written"),
}


@pytest.mark.all_faults
@pytest.mark.parametrize("mount", MOUNTS)
def test_real_file_systems(mount, tmp_path):
    options, reason = MOUNTS[mount]
    run = [sys.executable, "-m", "moresjax.cli"]
    run += cli_arguments("stage=llm", tmp_path / "disk" / "run", SAVES)
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs {options} tmpfs {tmp_path}/disk && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *run],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("moresjax: error: ")]
    assert reason in line
