"""A tiny model answers every benchmark from its official files to the files for its server."""

import json

import pytest

from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.predictions import FILE
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import benchmark_names, load_benchmark
from moresjax.testing.benchmark_files import DOWNLOADS, write
from moresjax.testing.models import terse_model

LIMIT = 2
SERVER = {
    "textcaps": ["test"],
    "textvqa": ["test"],
    "vizwiz": ["test"],
    "vizwiz_ft": ["test"],
    "mmmu": ["test"],
    "vqav2": ["test", "test-dev"],
}
CASES = [
    *((name, None) for name in benchmark_names()),
    *((name, split) for name, splits in SERVER.items() for split in splits),
    ("scienceqa", "minitest"),
]


@pytest.fixture(scope="module")
def model():
    return terse_model()


@pytest.fixture
def asked(monkeypatch) -> list:
    """The questions the model is asked."""
    found = []

    def spy(method):
        def answer(self, requests, **options):
            found.extend(request.doc.id for request in requests)
            return method(self, requests, **options)

        return answer

    for name in ("generate_until", "loglikelihood"):
        monkeypatch.setattr(MoresjaxLM, name, spy(getattr(MoresjaxLM, name)))
    return found


@pytest.mark.parametrize(("name", "split"), CASES)
def test_a_model_answers(name, split, model, asked, tmp_path):
    write(tmp_path, DOWNLOADS[name]())
    out = tmp_path / "out"
    options = {"data_root": tmp_path, "limit": LIMIT, "split": split}
    tasks = load_benchmark(name, **options)
    result = evaluate(model, [name], batch_size=2, out=out, **options)
    expected = [(task.name, example.id) for task in tasks for example in task.examples]
    assert [(row["task"], row["id"]) for row in result.predictions] == expected
    assert set(asked) == {name for _, name in expected}
    for task in tasks:
        entry = result.scores[task.name]
        assert (entry["n"], entry["missing"]) == (len(task.examples), 0)
        assert "errors" not in entry
        # The answers of a server are not known, and MMHal's need a judge.
        assert (entry["score"] is None) == (name == "mmhal" or split in SERVER.get(name, ()))

    write_results(result, out)
    rows = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    assert [(row["task"], row["id"]) for row in rows] == expected
    assert set(json.loads((out / "results.json").read_text())["scores"]) == set(result.scores)
    for file in {name.split("/")[0] for name in result.submissions}:
        read = rescore(name, out / file, **options).predictions
        assert [(row["task"], row["id"]) for row in read] == expected
    assert (split in SERVER.get(name, ())) <= bool(result.submissions)

    asked.clear()
    again = evaluate(model, [name], batch_size=2, out=out, **options)
    assert asked == []
    assert (again.scores, again.predictions) == (result.scores, result.predictions)
