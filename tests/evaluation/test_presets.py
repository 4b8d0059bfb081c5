"""Presets: those benchmarks whose data are at hand are run, and cells say who graded them."""

import json

import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.presets import PRESETS, table
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import load_benchmark, load_tasks
from moresjax.testing.benchmark_files import DOWNLOADS, write
from moresjax.testing.models import terse_model


@pytest.fixture(scope="module")
def model():
    return terse_model()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The data of `mores-table6`, with POPE's but without HallusionBench's."""
    root = tmp_path_factory.mktemp("data")
    write(root, DOWNLOADS["pope"]())
    return root


def test_a_preset_goes_on_without_a_data_set(model, root, tmp_path, monkeypatch, capsys):
    options = {"data_root": root, "limit": 2, "batch_size": 2}
    result = evaluate(model, ["mores-table6"], **options)
    assert set(result.scores) == {"pope_random", "pope_popular", "pope_adversarial"}
    assert list(result.not_run) == ["hallusionbench"]
    assert f"{root / 'hallusionbench'} does not exist" in result.not_run["hallusionbench"]
    assert result.mean_accuracy is None
    # On the command line everything is written before the exit code says it.
    monkeypatch.setattr("moresjax.cli.evaluate.load_model", lambda *_, **__: model)
    arguments = ["evaluate", "--model", "x", "--tasks", "mores-table6", "--data-root", str(root)]
    out = tmp_path / "out"
    assert main([*arguments, "--limit", "2", "--batch-size", "2", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "hallusionbench           not run: " in printed.out
    assert printed.out.split("\n")[-3].split()[1:] == ["-", "-", "-"]
    assert printed.err.count("\n") == 1
    assert "not run were hallusionbench (" in printed.err
    data = json.loads((out / "results.json").read_text())
    assert (list(data["not_run"]), data["mean_accuracy"]) == (["hallusionbench"], None)
    assert set(data["scores"]) == set(result.scores)
    # With the data it is made up for.
    write(tmp_path, DOWNLOADS["hallusionbench"]() | DOWNLOADS["pope"]())
    again = evaluate(model, ["mores-table6"], **options | {"data_root": tmp_path}, out=out)
    assert "not_run" not in json.loads((out / "results.json").read_text())
    assert len(again.scores) == 4


def test_what_is_named_itself_must_be_there(model, root):
    options = {"data_root": root, "limit": 2, "batch_size": 2}
    with pytest.raises(UserError, match="hallusionbench does not exist"):
        evaluate(model, ["mores-table6", "hallusionbench"], **options)
    with pytest.raises(UserError, match="hallusionbench does not exist"):
        load_tasks(["mores-table6"], root, 2, None)
    with pytest.raises(UserError, match="unknown split of pope 'val'"):
        evaluate(model, ["mores-table6"], split="pope=val", **options)
    with pytest.raises(UserError, match="task vqav2 reads its official files; say where they are"):
        evaluate(model, "mores-table1", limit=1)


def test_errors_name_presets_too():
    with pytest.raises(UserError, match="unknown task 'mores-table3'; choose from: ") as error:
        load_benchmark("mores-table3")
    for name in (*PRESETS, "FILE.jsonl", "or a task of lm_eval"):
        assert name in str(error.value)


def test_cells_that_a_rule_graded_are_marked():
    def entry(name: str, score: float, judge: str = "") -> dict:
        made = {"benchmark": name, "metric": "accuracy", "n": 4, "missing": 0, "details": {}}
        return (
            made | {"score": score, "stderr": 0.1} | ({"judge": {"name": judge}} if judge else {})
        )

    names = [name for name, _ in PRESETS["mores-table1"].columns.values()]
    scores = {name: entry(name, 0.5) for name in names}
    scores["mm_vet"] = entry("mm_vet", 0.3, "rule")
    lines = table(scores, ["mores-table1"]).split("\n")
    assert lines[-2].split() == [*["50.0"] * 5, "30.0*", "50.0", "47.1*"]
    assert lines[-1] == "* graded by a rule, not by a judge: no published number"
    scores["mm_vet"] = entry("mm_vet", 0.3, "gpt-4")
    assert table(scores, ["mores-table1"]).split("\n")[-1].split()[-3:] == ["30.0", "50.0", "47.1"]
    # A column that the mean leaves out does not mark it.
    mrt = [name for name, _ in PRESETS["mrt-table1"].columns.values()]
    scores = {name: entry(name, 0.5) for name in mrt} | {
        "mme_sampled": entry("mme_sampled", 0.5, "rule")
    }
    assert table(scores, ["mrt-table1"]).split("\n")[-2].split() == ["50.0*", *["50.0"] * 8]
