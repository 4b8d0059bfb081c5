"""The store of hidden states."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from moresjax.analysis.states import States, StatesWriter
from moresjax.core.errors import UserError

KEYS = [("llm.block.out", 1), ("llm.block.out", 3), ("llm.norm.out", 0)]
META = {"take": "prompt", "model": "abc"}


def state(number, key):
    return np.full(4, number, np.float32) + np.arange(4) + 100 * KEYS.index(key)


def add(writer, numbers):
    for number in numbers:
        row = {"id": str(number), "found": number % 3 > 0}
        writer.add(row, {key: state(number, key) for key in KEYS})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_store_gives_back_what_was_written(tmp_path, dtype):
    with StatesWriter(tmp_path / "s", KEYS, 4, META, dtype=dtype, rows=4) as writer:
        add(writer, range(10))
    states = States(tmp_path / "s")
    assert len(states) == 10
    assert states.ids == [str(n) for n in range(10)]
    assert states.sites == ["llm.block.out", "llm.norm.out"]
    assert states.layers == [0, 1, 3]
    assert states.meta["dtype"] == dtype
    assert states.meta["take"] == "prompt"
    assert states.found.tolist() == [n % 3 > 0 for n in range(10)]
    for site, layer in KEYS:
        expected = np.stack([state(n, (site, layer)) for n in range(10)])
        np.testing.assert_array_equal(states.matrix(site, layer), expected)
        pieces = list(states.chunks(site, layer, rows=3))
        assert [len(piece) for piece in pieces] == [3, 3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    some = states.take([9, 0, 4]).take([2, 0])
    assert some.ids == ["4", "9"]
    assert len(some.take([])) == 0
    np.testing.assert_array_equal(some.matrix("llm.norm.out")[:, 0], [204, 209])
    found = states.take(states.found)
    assert len(found) == 6
    assert found.matrix("llm.block.out", 1)[:, 0].tolist() == [1, 2, 4, 5, 7, 8]


def test_one_shard_is_a_memory_map_and_files_need_no_pickle(tmp_path):
    with StatesWriter(tmp_path, KEYS, 4) as writer:
        add(writer, range(3))
    assert isinstance(States(tmp_path).matrix("llm.norm.out"), np.memmap)
    names = sorted(file.name for file in tmp_path.iterdir() if file.name[0] != ".")
    assert names == [
        "index.p0.00000.jsonl",
        "llm.block.out.1.p0.00000.npy",
        "llm.block.out.3.p0.00000.npy",
        "llm.norm.out.0.p0.00000.npy",
        "states.json",
    ]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import moresjax.analysis.states as module
from test_states import KEYS, META, add
writer = module.StatesWriter({folder!r}, KEYS, 4, META, rows=4)
add(writer, range(4))
replaced = []
original = module.Path.replace
def replace(self, target):
    if len(replaced) == {files}:
        os.kill(os.getpid(), signal.SIGKILL)
    replaced.append(target)
    return original(self, target)
module.Path.replace = replace
add(writer, range(4, 9))
"""


@pytest.mark.parametrize("files", [2, 3])  # shards of the second flush that are there
def test_a_killed_writer_loses_only_what_it_had_not_written(tmp_path, files):
    from pathlib import Path

    folder = tmp_path / "s"
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), files=files)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert States(folder).ids == [str(n) for n in range(4)]
    with StatesWriter(folder, KEYS, 4, META, rows=4) as writer:
        assert writer.done == {str(n) for n in range(4)}
        add(writer, [n for n in range(9) if str(n) not in writer.done])
    states = States(folder)
    assert states.ids == [str(n) for n in range(9)]
    for key in KEYS:
        np.testing.assert_array_equal(states.matrix(*key), [state(n, key) for n in range(9)])


def test_processes_have_files_of_their_own(tmp_path):
    for process in (1, 0):
        with StatesWriter(tmp_path, KEYS, 4, META, process=process) as writer:
            add(writer, [process, process + 2])
    states = States(tmp_path)
    assert states.ids == ["0", "2", "1", "3"]
    assert states.matrix("llm.block.out", 1)[:, 0].tolist() == [0, 2, 1, 3]


def test_mistakes_are_told(tmp_path):
    folder = tmp_path / "s"
    writer = StatesWriter(folder, KEYS, 4, META)
    with pytest.raises(UserError, match="another process writes states into"):
        StatesWriter(folder, KEYS, 4, META)
    add(writer, range(2))
    with pytest.raises(UserError, match=r"reach 7e\+04, which float16 does not hold"):
        writer.add({"id": "large"}, {key: np.full(4, 7e4) for key in KEYS})
    writer.close()
    with pytest.raises(UserError, match="holds states with model='abc', not 'def'"):
        StatesWriter(folder, KEYS, 4, META | {"model": "def"})
    states = States(folder)
    with pytest.raises(UserError, match="several sites: choose one of llm"):
        states.matrix()
    with pytest.raises(UserError, match=r"unknown layer .* '2'; choose from: 1, 3"):
        states.matrix("llm.block.out", 2)
    with pytest.raises(UserError, match="holds no states"):
        States(tmp_path)
    with pytest.raises(UserError, match="holds s; states need a new folder"):
        StatesWriter(tmp_path, KEYS, 4)
    (folder / "llm.norm.out.0.p0.00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"llm\.norm\.out.*cannot be used"):
        States(folder)
    (folder / "index.p0.00000.jsonl").write_text(json.dumps({"id": "0"}) + "\n{")
    with pytest.raises(UserError, match="is damaged"):
        States(folder)
    with pytest.raises(ValueError, match="equally many"):
        States.from_arrays({KEYS[0]: np.zeros((2, 4))}, [{"id": "a"}])
