"""JSON of a run: whole or not there, and damage is one sentence."""

import json
import os
import stat

import pytest

from moresjax.core.errors import UserError
from moresjax.core.folders import check_new, is_empty, new_file, new_folder, remove_partial
from moresjax.core.json_files import (
    append_log,
    read_json,
    read_log,
    read_object,
    write_json,
    write_log,
)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "train.json"
    for value in ({"step": 1}, {"step": 2, "x": [1.5, float("inf")]}):
        write_json(file, value)
        assert read_object(file) == value
    assert file.read_text() == json.dumps(value, indent=2) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_modes_and_links_stay(tmp_path):
    file, link = tmp_path / "real.json", tmp_path / "link.json"
    write_json(file, 1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    file.chmod(0o640)
    link.symlink_to(file)
    write_json(link, 2)
    assert link.is_symlink()
    assert read_json(file) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, 1)
    with pytest.raises(TypeError):
        write_json(file, object())
    with pytest.raises(ZeroDivisionError), new_file(file) as fresh:
        fresh.write_text(str(1 / 0))
    assert read_json(file) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing/x.json", "No such file or directory"),
        ("file/x.json", "Not a directory; a file is where a folder should be"),
        ("folder", "Is a directory"),
        ("n" * 300, "File name too long; choose a shorter name"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path, place, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for write in (write_json, append_log):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write(tmp_path / place, {})
        told = UserError(f"{tmp_path / place} cannot be written: {reason}")  # short, as all are
        assert str(caught.value) == str(told)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file} cannot be used: ") as caught:
        read_json(file)
    assert len(str(caught.value)) < 400


def test_a_log_goes_on_behind_whatever_a_killed_process_left(tmp_path):
    rows = [{"n": 0, "text": "é" * 40_000}, {"n": 1}, {"n": 2}]
    file = tmp_path / "log.jsonl"
    write_log(file, rows)
    whole = file.read_bytes()
    second = whole.index(b"\n", len(whole) - 20) + 1
    for cut in (*range(12), *range(second - 12, len(whole) + 1), len(whole) // 2):
        file.write_bytes(whole[:cut])
        before = read_log(file)
        assert before == rows[: len(before)]
        append_log(file, {"n": "new"})
        assert read_log(file) == [*before, {"n": "new"}]
        assert file.read_bytes().count(b"\n") == len(before) + 1


def test_a_damaged_line_in_the_middle_of_a_log_is_told(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"n": 0}\n{"n\n{"n": 2}\n')
    with pytest.raises(UserError, match=f"^line 2 of {file} cannot be used: it is not JSON: "):
        read_log(file)
    assert read_log(tmp_path / "none.jsonl") == []


def test_what_killed_processes_did_not_finish_is_in_nobodys_way(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / f".x.json.partial-{'0a' * 8}").write_text("half")
    (out / f".shard.partial-{'1b' * 8}").mkdir()
    assert is_empty(out)
    check_new(out, "export")
    with new_folder(out, "export") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    (out / f".x.json.partial-{'0a' * 8}").write_text("half")
    remove_partial(out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
