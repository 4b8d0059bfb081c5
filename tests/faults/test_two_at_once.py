"""Two writers of one folder: the second one is told, and the lock of a killed one is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import clean_environment
from run_helpers import HEAD, cli_arguments, curve

from moresjax.cli import main
from moresjax.core import locks
from moresjax.core.errors import UserError
from moresjax.core.folders import LOCK
from moresjax.core.locks import FolderLock, locked

# Holds the lock of a folder until it is told to end.
HOLD = """
import sys
from moresjax.core.locks import FolderLock
lock = FolderLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
lock.close()
"""


def hold(folder) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=clean_environment(), **pipes
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_told_until_the_holder_ends_or_is_killed(tmp_path):
    out = tmp_path / "new" / "out"
    with hold(out) as holder:
        with pytest.raises(UserError, match=f"being written to by process {holder.pid}; wait"):
            FolderLock(out)
        holder.stdin.close()
    assert not (tmp_path / "new").exists()  # it was let go of, and nothing had been written
    with hold(out) as holder:
        (out / f".x.partial-{'0a' * 8}").write_text("half")
        holder.send_signal(signal.SIGKILL)
    assert (out / LOCK).is_file()
    with FolderLock(out):
        assert json.loads((out / LOCK).read_text())["process"] == os.getpid()
        assert [path.name for path in out.iterdir()] == [LOCK]


def write_lock(folder, **changes) -> None:
    content = locks._identity(os.getpid()) | changes
    (folder / LOCK).write_text(json.dumps(content))


def test_a_process_of_the_same_number_is_not_the_holder(tmp_path):
    write_lock(tmp_path, started="earlier")
    FolderLock(tmp_path).close()
    write_lock(tmp_path, process=2**22 + 1)  # beyond the greatest number of a process
    FolderLock(tmp_path).close()
    write_lock(tmp_path)
    with pytest.raises(UserError, match="wait for it"):
        FolderLock(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"host": 3}', '{"host": "elsewhere"}'])
def test_a_lock_of_another_host_says_how_to_remove_it(content, tmp_path):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(UserError, match=f"remove {tmp_path / LOCK}") as caught:
        FolderLock(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert (tmp_path / LOCK).read_text() == content


def test_a_thread_may_hold_a_lock_twice_and_another_thread_not(tmp_path):
    found = []

    def other() -> None:
        try:
            with locked(tmp_path):
                found.append("held")
        except UserError as error:
            found.append(str(error))

    with locked(tmp_path), locked(tmp_path), locked(None):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK).is_file()
    assert len(found) == 1
    assert "being written to" in found[0]
    assert not (tmp_path / LOCK).exists()


def test_many_processes_that_take_over_a_lock_hold_it_one_at_a_time(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from moresjax.core import locks
from moresjax.core.errors import UserError
from moresjax.core.locks import FolderLock
folder, children = Path(sys.argv[1]), []
for _ in range(5):
    child = os.fork()
    if child:
        children.append(child)
        continue
    held = 0
    while held < 10:
        try:
            lock = FolderLock(folder)
        except UserError:
            time.sleep(0.0005)
            continue
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # nobody else is
        held += 1
        os.unlink(folder / "inside")
        if held % 2:  # as one that was killed, whose number another process has
            (folder / ".moresjax-lock").write_text('{"host": "%s", "process": 1}' % HOST)
            locks._held.clear()
        else:
            lock.close()
    os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
    program = program.replace("% HOST", f"% {socket.gethostname()!r}")
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(arguments, env=clean_environment()).returncode == 0


def test_train_and_evaluate_refuse_a_folder_that_is_being_written_to(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train = cli_arguments("stage=llm", run, HEAD)
    assert main(train) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    model = ["evaluate", "--model", str(run), "--tasks", "digits", "--limit", "1"]
    capsys.readouterr()
    with hold(run), hold(out):
        longer = cli_arguments("stage=llm", run, HEAD | {"steps": 8})
        assert main(longer) == 2
        assert main([*model, "--out", str(out)]) == 2
        errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if "is being written to by process" in line]) == 2, errors
    before.pop(run / LOCK, None)
    assert {path: path.read_bytes() for path in before} == before
    assert main(longer) == 0
    assert curve(run, "loss")
    assert not (run / LOCK).exists()
