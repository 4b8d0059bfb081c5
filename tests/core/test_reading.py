"""What comes from outside is bounded, typed, and refused in one short sentence."""

import os
from typing import Any, TypedDict

import pytest

from moresjax.core import patterns, reading
from moresjax.core.errors import LONGEST, UserError, choice_error
from moresjax.core.parameter_names import matches


class Described(TypedDict, total=False):
    spec: str
    sites: dict[str, list[str]]
    steps: reading.Count


JSON = {
    "nested": ("[" * 20_000, "nested more than 100 deep"),
    "101 deep": ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
    "digits": ('{"steps": ' + "9" * 5000 + "}", "a number has thousands of digits"),
    "half a pair": ('{"spec": "\\ud800"}', "half of a surrogate pair"),
    "cut": ('{"spec": "a', "it is not JSON: Unterminated string"),
    "list": ("[]", "expected `object`, got `array`"),
    "null": ("null", "expected `object`, got `null`"),
    "type": ('{"sites": {"a": ["b", 2]}}', r"expected `str`, got `int` at sites\[...\]\[1\]"),
    "large": ('{"steps": 2147483648}', "expected `int` <= 2147483647 at steps"),
    "truth": ('{"steps": true}', "expected `int`, got `bool` at steps"),
}


@pytest.mark.parametrize("name", JSON)
def test_bad_json_is_one_sentence_with_the_file(name, tmp_path):
    text, message = JSON[name]
    file = tmp_path / "tuning.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"tuning\.json.* {message}"):
        reading.read_json(file, Described)
    (tmp_path / "log.jsonl").write_text('{"spec": "none", "more": [1]}\n' + text + "\n")
    with pytest.raises(UserError, match=rf"^line 2 of .*log\.jsonl.* {message}"):
        reading.read_json_lines(tmp_path / "log.jsonl", Described)


def test_what_is_allowed_is_returned_as_it_is(tmp_path):
    file = tmp_path / "tuning.json"
    file.write_text('\ufeff{"spec": "mores", "more": {"a": [' + "[" * 97 + "]" * 97 + "]}}")
    assert reading.read_json(file, Described)["more"]["a"]
    file.write_text('{"steps": 1}\n\n{"steps": 2}\n{"steps": 3')
    assert reading.read_json_lines(file, Described, torn=True) == [{"steps": 1}, {"steps": 2}]
    with pytest.raises(UserError, match="line 4 of"):
        reading.read_json_lines(file, Described)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long.json").write_text("[" + " " * 100 + "]")
    for path, message in (
        ("/dev/zero", "is a device, not a file"),
        (tmp_path / "pipe", "is a pipe, not a file"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a\0b", "cannot be read: .*embedded null"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
        (tmp_path / "long.json" / "none", "does not exist"),
        (tmp_path / "long.json", "has 102 bytes; at most 100 are read"),
    ):
        with pytest.raises(UserError, match=message):
            reading.read_json(path, Any, most=100)
    with pytest.raises(UserError, match="has more than 10 bytes"):
        reading.read_text("/proc/self/status", most=10)  # which says that it has none
    (tmp_path / "latin").write_bytes(b'"\xe9"')
    for read in (reading.read_json, reading.read_json_lines):
        with pytest.raises(UserError, match="is not UTF-8 text"):
            read(tmp_path / "latin")


def test_a_long_line_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LINE", 10)
    (tmp_path / "log").write_text('{"a": 1}\n{"a": 1, "b": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log has more than 10 bytes"):
        reading.read_json_lines(tmp_path / "log")


def test_messages_are_short_and_printable():
    for message in ("x" * 50_000_000, "\x1b[31m" * 99, "\ud800\0" * 300, "a\nb\tc"):
        said = str(UserError(message))
        assert len(said) <= LONGEST
        assert said.isprintable()
    names = [f"benchmark_{i}" for i in range(500)]
    said = str(choice_error("task " + "t" * 999, "benchmark_77" + "x" * 9999, names))
    assert len(said) <= LONGEST
    said = str(choice_error("task", "benchmark_7x", names))
    assert len(said) <= LONGEST
    assert said.startswith("unknown task 'benchmark_7x'; choose from: benchmark_7")
    assert said.endswith(" more")


def test_patterns_end(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    name = "llm.blocks.attn.q.kernel" + "a" * 40 + "x" * 40
    assert not matches(name, "(([a-z.]+)*)*X")
    with pytest.raises(UserError, match="takes too long to match; a repetition must not"):
        matches(name, "(?:(?:a|aa|b|[a-z.])+)+[XY]$")
    for pattern in ("*", "(", "(?R)", "a{99999999999}", "[", "(?P<x>a)(?P<x>b)", "\\"):
        with pytest.raises(UserError, match="is not a regular expression"):
            matches(name, pattern)
    with pytest.raises(UserError, match="has 9,999 characters"):
        matches(name, "a" * 9999)
    assert matches("llm.blocks.attn.q.kernel", r"llm\.blocks\.(?!mlp).*\.(q|v)\.\w+")
    assert patterns.full_match("a.*", "ab")
