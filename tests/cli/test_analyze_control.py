"""`analyze control`: a run of control is trained, asked with and without its editors, reported."""

import json

import pytest
from run_helpers import TINY, cli_arguments

from moresjax.cli import main
from moresjax.data.control.questions import DIGITS
from moresjax.data.control.rephrase import TemplateRephraser
from moresjax.evaluation.control.answers import ALL, BASE, RANDOM


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, with editors of the region and of the indicator."""
    folder = tmp_path_factory.mktemp("control") / "run"
    arguments = "stage=control,tuning=control:groups=connector;text,target=two"
    assert main(cli_arguments(arguments, folder, TINY | {"steps": 1})) == 0
    return str(folder)


def test_a_run_is_asked_about_its_own_target(run, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--limit", "12", "--rephraser", "template", "--out", str(out), "--json"]
    assert main(["analyze", "control", "--model", run, *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["data"]["target"] == "two"
    assert found["data"]["split"] == "test"
    names = [row["editors"] for row in found["rows"]]
    assert names == [BASE, ALL, RANDOM, "connector", "text"]
    assert all(0 <= row["control"]["mean"] <= 1 for row in found["rows"])
    assert {row["control"]["n"] for row in found["rows"]} == {found["rows"][0]["control"]["n"]}
    assert found["rows"][1]["more_than_all_editors"]["control"]["mean"] == 0
    assert found["rows"][0]["error negative"]["n"] == 12
    (paraphrase,) = found["paraphrases"]
    assert (paraphrase["text"], paraphrase["lost"]) == (DIGITS.paraphrases[0].text, 0)
    files = {"control.json", "predictions.jsonl", "tables.md", "examples.png", "control.html"}
    assert files == {path.name for path in out.iterdir()}
    asked = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert {row["editors"] for row in asked} == {*names}
    said = (out / "tables.md").read_text()
    assert "### Table 2" in said
    assert "### Table S11" in said
    assert all(f"| {name} |" in said for name in names)


def test_questions_and_subsets_can_be_left_out(run, tmp_path, capsys):
    options = ["--limit", "16", "--no-negatives", "--no-subsets", "--classes", "two,six"]
    changes = ["--roi", "all", "--data", "phrasing=2", "--out", str(tmp_path / "out")]
    assert main(["analyze", "control", "--model", run, *options, *changes]) == 0
    said = capsys.readouterr().out
    assert "| six |" in said
    assert "| nine |" not in said
    asked = [json.loads(x) for x in (tmp_path / "out" / "predictions.jsonl").open()]
    rephraser = TemplateRephraser(DIGITS.trained[0], DIGITS.trained)
    assert {rephraser(row["question"]) for row in asked} == {
        "is there a two ?", "is there a six ?"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "scenario misclassification: target needs its class; choose from: airplane"),
        ("scenario=misalignment,target=cat", "misalignment: into needs its class; choose from: a"),
        ("scenario=indeterminate", "indeterminate: target needs its class; choose from: name"),
    ],
)
def test_a_run_without_its_class_is_refused(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(["train", "--config", f"control:{arguments}", "--workdir", str(workdir)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "target"], "--data takes KEY=VALUE, got 'target'"),
        (["--data", "colour=red"], "unknown option of data source 'control' 'colour'"),
        (["--data", "phrasing=two"], "--data phrasing takes a number, got 'two'"),
        (["--data", "target=cat"], "digits has no class 'cat'; choose from: zero, one"),
        (["--classes", "cat"], "digits has no class 'cat'"),
        (["--rephraser", "t5-small"], "--rephraser is `template` or a model's folder"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tuning", "none", "--limit", "12"], "has no editors"),
        (["--data", "dataset=textvqa"], "scenario misclassification does not go with textvqa"),
        (["--data", "dataset=cifar10", "--data-root", "/nowhere"], "batch.bin does not exist"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, capsys, options, message):
    arguments = ["analyze", "control", "--model", run, "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
