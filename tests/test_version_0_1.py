"""Folders that version 0.1 wrote load, and compute what version 0.1 computed with them.

`fixtures/v0_1/make.py` made them, with that version's code. A failure here means that users lose
their runs, adapters or evaluations: mend the reader, never the fixtures.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import moresjax
from moresjax.cli import main

WRITTEN = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
PROMPTS = ["what is at top-left ?", "how many digits ?", "is there a seven ?"]
ADAPTERS = ("mores", "lora", "one", "two")


def images() -> list[list[np.ndarray]]:
    ramp = np.arange(32 * 32 * 3).reshape(32, 32, 3)
    return [[(ramp * factor % 251).astype(np.uint8)] for factor in (1, 3, 7)]


@pytest.fixture
def written(tmp_path) -> Path:
    """A copy of everything, in which a test may write."""
    return shutil.copytree(WRITTEN, tmp_path / "v0_1")


def check(model, name: str) -> None:
    """A model is the one that version 0.1 knew under this name."""
    expected = EXPECTED[name]
    assert model.tuning == expected["tuning"]
    # Evaluations go on only where the fingerprint is the same.
    assert model.fingerprint == expected["fingerprint"]
    logits = np.asarray(model.logits(PROMPTS, images()))
    assert list(logits.shape) == expected["shape"]
    np.testing.assert_allclose(logits[:, -1], expected["logits"], atol=2e-4)
    assert model.generate(PROMPTS, images(), max_new_tokens=10) == expected["texts"]


@pytest.mark.parametrize("name", ["base", "mores"])
def test_a_run_loads(name):
    check(moresjax.load(WRITTEN / name), name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_on_its_base(name):
    model = moresjax.load(WRITTEN / "base")
    model.load_adapter(WRITTEN / "adapters" / name)
    check(model, f"adapters/{name}")


def test_the_configuration_of_an_imported_model_names_the_same_architecture():
    from moresjax.models.zoo import ENCODERS, LLMS
    from moresjax.runs.architecture import model_config
    from moresjax.runs.config import read_config

    def fields(part) -> dict:
        found = dataclasses.asdict(part)
        encoders = found.get("encoders", ())
        for each in (found, *encoders):
            each.pop("model_type", None)  # version 0.1 did not write it
        return found

    found = model_config(read_config(WRITTEN / "imported" / "config.json"))
    assert fields(found.llm) == fields(LLMS["gemma-3-1b"])
    assert fields(found.vision) == fields(ENCODERS["mof-l-14-336"])


def test_several_adapters_load_together():
    model = moresjax.load(WRITTEN / "base")
    model.load_adapters({name: WRITTEN / "adapters" / name for name in ("one", "two")})
    texts = model.generate(PROMPTS, images(), max_new_tokens=10, adapters=["one", None, "two"])
    assert texts == EXPECTED["many"]["texts"]
    # Of other methods, and with connectors of their own, beside these.
    model.load_adapters({name: WRITTEN / "adapters" / name for name in ("lora", "mores")})
    names = ["lora", "mores", "two"]
    texts = model.generate(PROMPTS, images(), max_new_tokens=10, adapters=names)
    logits = np.asarray(model.logits(PROMPTS, images(), adapters=names))
    for row, name in enumerate(names):
        expected = EXPECTED[f"adapters/{name}"]
        assert texts[row] == expected["texts"][row]
        np.testing.assert_allclose(logits[row, -1], expected["logits"][row], atol=2e-4)


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["base", "mores"])
def test_a_run_is_counted(name, capsys):
    assert main(["params", "--model", str(WRITTEN / name), "--json"]) == 0
    assert last_json(capsys) == EXPECTED[name]["count"]


def test_a_run_is_exported_as_the_same_adapter(written):
    out = written / "again"
    assert main(["export", str(written / "mores"), str(out), "--format", "adapter"]) == 0
    model = moresjax.load(written / "base")
    model.load_adapter(out)
    check(model, "mores")


def evaluate(written: Path) -> list[dict]:
    """Evaluates as version 0.1 did; the rows of the predictions."""
    model, out = str(written / "mores"), written / "results"
    arguments = ["evaluate", "--model", model, "--tasks", "digits", "--limit", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    return read_rows(out)


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_an_evaluation_goes_on_without_asking_again(written):
    path = written / "results" / "predictions.jsonl"
    rows = read_rows(path.parent)
    assert len(rows) == 21
    # No model says this: where it is kept, nobody asked again. The last question has no answer yet.
    marked = [row | {"prediction": "kept from 0.1"} for row in rows[:-1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    again = {(row["task"], row["id"]): row["prediction"] for row in evaluate(written)}
    wanted = {(row["task"], row["id"]): row["prediction"] for row in [*marked, rows[-1]]}
    assert again == wanted


def test_an_evaluation_from_the_start_gives_the_same_answers_and_scores(written):
    before = read_rows(written / "results")
    scores = json.loads((written / "results" / "results.json").read_text())
    shutil.rmtree(written / "results")
    # Rows of 0.1 have neither the fingerprint of the exact weights nor those of the images.
    rows = evaluate(written)
    assert all(row.pop("weights") and row.pop("images") for row in rows)
    assert rows == before
    again = json.loads((written / "results" / "results.json").read_text())
    for name, entry in scores["scores"].items():
        assert entry.items() <= again["scores"][name].items()
    assert again["processor"] == scores["processor"]


def test_predictions_are_scored_again(written):
    results, out = written / "results", written / "scores"
    predictions = str(results / "predictions.jsonl")
    arguments = ["--predictions", predictions, "--tasks", "digits", "--limit", "3"]
    assert main(["evaluate", *arguments, "--out", str(out)]) == 0
    before, again = (
        json.loads((folder / "results.json").read_text())["scores"] for folder in (results, out)
    )
    assert {name: s["score"] for name, s in again.items()} == {
        name: s["score"] for name, s in before.items()
    }


def test_a_run_goes_on_from_its_step(written):
    from moresjax.runs.config import read_config
    from moresjax.training.loop import train

    workdir = written / "mores"
    wanted = moresjax.load(workdir).logits(PROMPTS, images())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    # As it was when step 2 was its last.
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "train.json").unlink()
    (workdir / "metrics.jsonl").write_text(lines[0] + "\n")

    result = train(read_config(workdir / "config.json"), workdir)
    assert result.step == 4
    again = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again] == [2, 4]
    before = json.loads(lines[1])
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert again[1][name] == pytest.approx(before[name], abs=1e-5), name
    np.testing.assert_allclose(
        moresjax.load(workdir).logits(PROMPTS, images()), np.asarray(wanted), atol=2e-4
    )


def test_a_finished_run_has_nothing_left_to_do(written):
    from moresjax.runs.config import read_config
    from moresjax.training.loop import train

    workdir = written / "mores"
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert train(read_config(workdir / "config.json"), workdir).step == 4
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
