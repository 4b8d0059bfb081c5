"""What `analyze attention` asks: files of questions, or the validation data of runs."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import DigitsSource
from moresjax.data.samples import Sample
from moresjax.evaluation.validation import validation_task
from moresjax.reports import attention

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"
DATA = {"name": "digits", "task": "instruct", "split": "val", "questions": 2, "size": 5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three runs: `one` and `two` with the same validation data, `other` with a held-out share."""
    root = tmp_path_factory.mktemp("runs")
    data = {"data": DATA}
    for name, validation in (("one", data), ("two", data), ("other", {"share": 0.5})):
        shutil.copytree(BASE, root / name)
        config = json.loads((BASE / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"validation": validation}))
    return root


def test_validation_data_are_asked_question_by_question(runs):
    task = validation_task([runs / "one", runs / "two"], limit=5)
    source = DigitsSource("instruct", split="val", questions=2, size=5)
    turns = []
    for number in range(3):
        sample = source[number]
        assert isinstance(sample, Sample)
        turns += [(sample, turn) for turn in sample.turns]
    assert len(task.examples) == 5
    for example, (sample, turn) in zip(task.examples, turns, strict=False):
        assert (example.prompt, example.answer) == (f"<image>\n{turn.question}", turn.answer)
        assert (example.images[0] == sample.images[0]).all()
    drawn = validation_task([runs / "one"], sample=3, seed=1)
    assert len(drawn.examples) == 3
    assert [e.id for e in drawn.examples] != [e.id for e in task.examples[:3]]


def test_runs_without_the_same_validation_data_are_refused(runs, tmp_path):
    for folders, message in (
        ([BASE], "has no validation data; give --tasks"),
        ([tmp_path], "is no run, so it has no validation data; give --tasks"),
        ([runs / "one", runs / "other"], "have different validation data; give --tasks"),
    ):
        with pytest.raises(UserError, match=message):
            validation_task(folders, limit=1)


def test_a_report_says_what_was_asked(runs, tmp_path, capsys, monkeypatch):
    command = [
        "analyze",
        "attention",
        "--limit",
        "2",
        "--batch-size",
        "2",
        "--json",
        "--out",
        str(tmp_path / "out"),
    ]
    model = ["--model", f"mine={runs / 'one'}"]
    assert main([*command, *model]) == 0
    found = json.loads(capsys.readouterr().out)["mine"]
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["mine"] == found
    assert (found["model"], found["template"], found["n"]) == (str(runs / "one"), "bare", 2)
    (task,) = found["tasks"].items()
    assert (task[0], task[1]["split"], task[1]["n"]) == ("validation", "validation", 2)
    assert (tmp_path / "out" / "attention_share.png").is_file()
    monkeypatch.setattr(attention, "write_attention_plots", lambda summaries, out: [])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "how many digits ?", "answer": "four"}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    own = ["--tasks", str(tmp_path / "own.jsonl"), "--image-root", str(tmp_path)]
    assert main([*command, *model, *own]) == 0
    found = json.loads(capsys.readouterr().out)["mine"]
    assert (found["samples"], found["n"], [*found["tasks"]]) == (1, 1, ["own"])
    assert found["tasks"]["own"]["split"] is None
    assert main([*command, "--model", str(BASE)]) == 2
    assert "has no validation data; give --tasks" in capsys.readouterr().err
    assert main([*command, *model, "--split", "val"]) == 2
    assert "--split is about --tasks" in capsys.readouterr().err
