"""Attention statistics in the pass that answers: the same answers, nothing lost, nothing mixed."""

import json
from pathlib import Path

import numpy as np
import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.attention_log import read_maps
from moresjax.evaluation.examples import Example
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.predictions import PredictionLog
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.analyze import attention_map
from moresjax.inference.model import Model
from moresjax.testing import talking_model

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"
OPTIONS = {"batch_size": 2, "attention": True}


@pytest.fixture(scope="module")
def model() -> Model:
    return talking_model()


@pytest.fixture(scope="module")
def tasks() -> list[BenchmarkTask]:
    """Two tasks of four questions each; the last one of the first has no image."""
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (4, 12, 12, 3)).astype(np.uint8))
    texts = ["how many ?", "is there a two ?", "what is at top-left ?", "is there a six ?"]
    first = [Example(str(n), texts[n], "two", (images[n],)) for n in range(3)]
    first.append(Example("3", "what is the largest ?", "two"))
    second = [Example(str(n), f"<image>\n{texts[n]}", "yes", (images[n],)) for n in range(4)]
    return [
        BenchmarkTask("first", first, max_new_tokens=3),
        BenchmarkTask("second", second, max_new_tokens=2),
    ]


@pytest.fixture(scope="module")
def whole(model, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return evaluate(model, tasks, out=out, **OPTIONS), out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_answers_are_those_without_statistics(model, tasks, whole):
    found, out = whole
    assert found.predictions == evaluate(model, tasks, batch_size=2).predictions
    assert (found.attention.samples, found.attention.excluded) == (7, 1)
    assert {name: one.samples for name, one in found.attention_by_task.items()} == {
        "first": 3,
        "second": 4,
    }
    entry = json.loads((out / "attention.json").read_text())["model"]
    assert entry["share"] == found.attention.share.tolist()
    np.testing.assert_allclose(np.mean(entry["share_by_head"], 1), entry["share"])
    assert (entry["n"], entry["samples"], entry["template"]) == (8, 7, "bare")
    assert entry["fingerprint"] == model.fingerprint
    assert entry["tasks"]["second"]["average_visual_share"] == pytest.approx(
        found.attention_by_task["second"].average_visual_share
    )
    by_question = [row["visual_share"] for row in rows(out / "attention.jsonl") if row["has_image"]]
    assert np.mean(by_question) == pytest.approx(entry["average_visual_share"])


@pytest.mark.parametrize("lost", ["prediction", "statistics"])
def test_a_killed_evaluation_goes_on(model, tasks, whole, tmp_path, monkeypatch, lost):
    add, added = PredictionLog.add, []

    def until_killed(self, task, example, prediction):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append((task, example.id))
        add(self, task, example, prediction)

    with monkeypatch.context() as patched:
        patched.setattr(PredictionLog, "add", until_killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tasks, out=tmp_path, **OPTIONS)
    log = tmp_path / "attention.jsonl"
    assert len(log.read_text().splitlines()) == 4  # the last one has no prediction
    known = set(added)
    if lost == "statistics":  # one was never read, the next is half written
        kept = rows(log)[1:]
        known.discard((kept[0]["task"], kept[0]["id"]))
        known &= {(row["task"], row["id"]) for row in kept}
        log.write_text("".join(json.dumps(row) + "\n" for row in kept[1:]) + '{"task": "fir')
    # Statistics of other weights are in the way.
    foreign = rows(whole[1] / "attention.jsonl")[0] | {"weights": "others", "visual_share": 5}
    log.write_text(json.dumps(foreign) + "\n" + log.read_text())
    asked, generate = [], MoresjaxLM.generate_until

    def count(self, requests, **options):
        asked.extend((request.task_name, request.doc.id) for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(MoresjaxLM, "generate_until", count)
    found = evaluate(model, tasks, out=tmp_path, **OPTIONS)
    every = {(task.name, example.id) for task in tasks for example in task.examples}
    assert sorted(asked) == sorted(every - known)
    assert found.predictions == whole[0].predictions
    for ours, theirs in (
        (found.attention, whole[0].attention),
        (found.attention_by_task["first"], whole[0].attention_by_task["first"]),
    ):
        assert (ours.samples, ours.excluded) == (theirs.samples, theirs.excluded)
        np.testing.assert_allclose(ours.share_by_head, theirs.share_by_head, atol=1e-6)
        np.testing.assert_allclose(ours.lmar["text"], theirs.lmar["text"], rtol=1e-4)
    assert "others" not in log.read_text()
    # Nothing is left to ask, and the statistics are read as they were written.
    asked.clear()
    again = evaluate(model, tasks, out=tmp_path, **OPTIONS)
    assert asked == []
    np.testing.assert_array_equal(again.attention.share_by_head, found.attention.share_by_head)
    # A part of the questions has the statistics of that part; later scores leave them.
    part = evaluate(model, tasks[1:], limit=2, out=tmp_path, **OPTIONS)
    assert (part.attention.samples, asked) == (2, [])
    evaluate(model, tasks, out=tmp_path, batch_size=2)
    assert json.loads((tmp_path / "results.json").read_text())["attention"]["samples"] == 2


def test_maps_are_those_of_the_answers(model, tasks, whole):
    found = read_maps(whole[1] / "attention_maps.npz")
    assert [(one.task, one.id) for one in found] == [
        ("first", "0"),
        ("second", "0"),
        ("first", "1"),
    ]
    shares = {(row["task"], row["id"]): row for row in rows(whole[1] / "attention.jsonl")}
    answers = {(row["task"], row["id"]): row["prediction"] for row in whole[0].predictions}
    for one in found:
        task = next(task for task in tasks if task.name == one.task)
        (example,) = (example for example in task.examples if example.id == one.id)
        np.testing.assert_array_equal(one.image, example.images[0])
        assert one.prediction == answers[one.task, one.id]
        share = shares[one.task, one.id]["visual_share"]  # the same tokens, read one by one
        assert one.grid.sum((1, 2)).mean() == pytest.approx(share, abs=1e-5)
    (one, example) = found[0], tasks[0].examples[0]
    told = attention_map(model, example.prompt, example.images, max_new_tokens=3)
    np.testing.assert_allclose(one.grid, told.grid.mean(1), atol=1e-5)


def test_tasks_without_written_answers_about_images_are_refused(model, tmp_path):
    ranked = BenchmarkTask("ranked", [Example("0", "is it ?", "A", choices=("two", "six"))])
    with pytest.raises(UserError, match="written answers to questions with images, and ranked has"):
        evaluate(model, [ranked], out=tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_analyze_writes(tmp_path, capsys):
    asked = ["--tasks", "digits", "--limit", "1", "--batch-size", "7", "--split", "val", "--json"]
    command = ["evaluate", "--model", str(BASE), *asked, "--attention", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    ours = json.loads((tmp_path / "attention.json").read_text())["base"]
    assert printed["attention"]["share"] == ours["share"]
    command = ["analyze", "attention", "--model", str(BASE), *asked, "--out", str(tmp_path / "a")]
    assert main(command) == 0
    theirs = json.loads((tmp_path / "a" / "attention.json").read_text())["base"]
    # The command of one model says what was put on it.
    assert ours.pop("adapter", "missing") is ours.pop("tuning", "missing") is None
    assert set(ours) == set(theirs)
    assert ours["tasks"] == theirs["tasks"]
    assert ours["tasks"]["digits_count"]["split"] == "val"
    for name in ("share", "share_by_head", "average_visual_share"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    again = ["--predictions", str(tmp_path / "predictions.jsonl"), "--tasks", "digits"]
    assert main(["evaluate", *again, "--attention", "--out", str(tmp_path / "again")]) == 2
    assert "without a model or its attention" in capsys.readouterr().err
