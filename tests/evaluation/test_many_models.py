"""`moresjax evaluate` of several models: results for each, and one set of compiled programs."""

import json
import logging
import shutil
from pathlib import Path

import jax
import pytest
from run_helpers import compilations

from moresjax.cli import main

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"
ASK = ["evaluate", "--tasks", "digits", "--limit", "1", "--attention", "--json", "--model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Two runs of one shape."""
    folder = tmp_path_factory.mktemp("runs")
    places = [folder / f"seed={seed}" / "base" for seed in (0, 1)]
    return [str(shutil.copytree(BASE, place)) for place in places]


def test_every_model_has_its_results_and_the_second_compiles_nothing(
    runs, tmp_path, capsys, caplog
):
    assert main([*ASK, runs[0], "--out", str(tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        assert main([*ASK, *runs, "--out", str(tmp_path / "both")]) == 0
    assert compilations(caplog) == []
    printed = json.loads(capsys.readouterr().out)["models"]
    assert list(printed) == ["seed=0/base", "seed=1/base"]
    for (name, found), folder in zip(printed.items(), runs, strict=True):
        assert found == json.loads((tmp_path / "both" / name / "results.json").read_text())
        assert (found["model"], found["scores"]) == (folder, alone["scores"])
        attention = json.loads((tmp_path / "both" / name / "attention.json").read_text())
        assert list(attention) == [name]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["{0}", "{0}"], [], "--model base is given twice; NAME=DIR gives it a name of its own"),
        (["{0}", "{1}/lost"], [], "lost does not exist"),
        (["a={0}", "a={1}"], [], "--model a is given twice"),
        (["{0}", "{1}"], ["--forgetting", "{0}"], "--forgetting compares one --model with"),
        ([], [], "evaluate needs --model DIR, or --predictions FILE"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is(
    models, options, message, runs, tmp_path, capsys
):
    command = [word.format(*runs) for word in (*(["--model"] * bool(models)), *models, *options)]
    assert main([*ASK[:-1], *command, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
