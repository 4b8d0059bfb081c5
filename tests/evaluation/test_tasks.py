"""The registry of benchmarks: names, plug-ins, and what a task is by default."""

import json

import pytest

from moresjax.core.errors import UserError
from moresjax.core.plugins import use_plugins
from moresjax.evaluation import tasks as tasks_module
from moresjax.evaluation.examples import Example
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.tasks import (
    BenchmarkTask,
    benchmark,
    benchmark_names,
    load_benchmark,
    register_benchmark,
)

PLUGIN = """
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask, benchmark


@benchmark("snow")
def load(data_root=None, limit=None, split="winter"):
    questions = [Example("1", f"What colour is snow in {split}?", "white")]
    return [BenchmarkTask("snow", questions[:limit])]
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    benchmark_names()
    monkeypatch.setattr(tasks_module, "_BENCHMARKS", dict(tasks_module._BENCHMARKS))


def questions(data_root=None, limit=None) -> list[BenchmarkTask]:
    return [BenchmarkTask("mine", [Example("1", "?", "yes"), Example("2", "?", "no")][:limit])]


def test_a_plugin_file_brings_its_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("MORESJAX_PLUGINS", "")
    (tmp_path / "snow_plugin.py").write_text(PLUGIN)
    use_plugins([tmp_path / "snow_plugin.py"])
    assert "snow" in benchmark_names()
    (task,) = load_benchmark("snow", split="summer")
    assert (task.benchmark, task.examples[0].prompt) == ("snow", "What colour is snow in summer?")
    (tmp_path / "saved.json").write_text(json.dumps({"1": "White"}))
    assert rescore("snow", tmp_path / "saved.json").scores["snow"]["score"] == 1


def test_a_benchmark_may_be_registered_again_where_it_was():
    """The cell of a notebook runs twice."""
    for name in ("1", "2"):

        @benchmark("mine")
        def load(data_root=None, limit=None, name=name) -> list[BenchmarkTask]:
            return [BenchmarkTask("mine", [Example(name, "?", "x")])]

    (task,) = load_benchmark("mine")
    assert task.examples[0].id == "2"


def test_names_of_others_are_taken():
    with pytest.raises(UserError, match="the benchmark name 'pope' is taken"):
        register_benchmark("pope", questions)
    with pytest.raises(UserError, match="'mores-table1' is taken by a preset"):
        benchmark("mores-table1")(questions)


def test_a_task_is_plain_data():
    (task,) = questions(limit=1)
    assert (task.max_new_tokens, task.ranks_choices, dict(task.submissions)) == (128, False, {})
    assert task.scorer(task.examples, [" YES"]).value == 1
    ranked = BenchmarkTask("ranked", [Example("1", "?", "A", choices=("yes", "no"))])
    assert ranked.ranks_choices
