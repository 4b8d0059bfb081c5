"""Evaluations whose answers are drawn: reproducible, told apart, never mixed with others."""

import argparse
import dataclasses
import json

import pytest

from moresjax.cli import evaluate as command
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.presets import table
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import load_benchmark
from moresjax.generation.sampling import Sampling
from moresjax.testing.benchmark_files import DOWNLOADS, write
from moresjax.testing.models import talking_model

HOT = Sampling(temperature=1000.0, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def model():
    return talking_model()


def answers(model, **options) -> dict[tuple[str, str], str]:
    options = {"tasks": ["digits"], "limit": 1, "batch_size": 4, "sampling": HOT} | options
    found = evaluate(model, **options)
    return {(row["task"], row["id"]): row["prediction"] for row in found.predictions}


def test_what_is_drawn_depends_on_the_seed_and_the_question_alone(model):
    options = {"tasks": load_benchmark("digits", limit=6)[:1], "limit": 6}
    drawn = answers(model, **options)
    assert answers(model, **options | {"limit": 2}).items() <= drawn.items()
    for other in (Sampling(), Sampling(temperature=1000.0, top_p=0.95, seed=6)):
        assert answers(model, **options, sampling=other) != drawn
    assert len({text for (_, _), text in drawn.items()}) > len(drawn) // 2


def test_the_folder_says_how_answers_were_drawn_and_takes_no_others(model, tmp_path, monkeypatch):
    out, again = tmp_path / "out", tmp_path / "again"
    drawn = answers(model, out=out)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    told = "temperature 1000, top_p 0.95, seed 5"
    assert {row["decoding"] for row in rows} == {told}
    assert json.loads((out / "results.json").read_text())["decoding"] == told
    rescored = rescore("digits", out / "predictions.jsonl", limit=1)
    assert (rescored.decoding, len(rescored.predictions)) == (told, len(drawn))
    write_results(rescored, again)
    assert json.loads((again / "results.json").read_text())["decoding"] == told
    monkeypatch.setattr(MoresjaxLM, "generate_until", None)  # nothing is asked again
    assert answers(model, out=out) == drawn
    for other in (Sampling(), Sampling(temperature=1000.0, top_p=0.95, seed=6)):
        with pytest.raises(UserError, match=f"by other decoding \\({told}, not "):
            answers(model, out=out, sampling=other)


def test_a_benchmark_may_draw_its_answers_itself(model, tmp_path, monkeypatch):
    (task,) = load_benchmark("digits", limit=4)[:1]
    hot = dataclasses.replace(task, temperature=1000.0)
    options = {"tasks": [hot], "limit": 4}
    drawn = answers(model, **options, sampling=Sampling(), out=tmp_path)
    assert drawn == answers(model, **options, sampling=Sampling(seed=3))
    assert drawn == answers(model, tasks=[task], limit=4, sampling=Sampling(temperature=1000.0))
    assert drawn != answers(model, tasks=[task], limit=4, sampling=Sampling())
    (entry,) = json.loads((tmp_path / "results.json").read_text())["scores"].values()
    assert entry["decoding"] == "temperature 1000, seed 0"
    assert "temperature 1000, seed 0)" in table({"digits": entry})
    monkeypatch.setattr("moresjax.evaluation.rescore.load_tasks", lambda *_: [hot])
    again = rescore("digits", tmp_path / "predictions.jsonl")
    assert again.scores[hot.name] == entry  # scored again, it says so too
    # The evaluation's own sampling wins, and is its own note.
    assert hot.sampling(HOT) == HOT


def test_mme_is_drawn_as_mrts_code_draws_it(tmp_path):
    write(tmp_path, DOWNLOADS["mme_sampled"]())
    (plain,), (drawn,) = (
        load_benchmark(name, data_root=tmp_path, limit=2) for name in ("mme", "mme_sampled")
    )
    assert (plain.temperature, plain.sampling(Sampling())) == (0.0, Sampling())
    assert drawn.sampling(Sampling(seed=7)) == Sampling(temperature=0.4, seed=0)
    assert [x.prompt for x in drawn.examples] == [x.prompt for x in plain.examples]


def test_lm_eval_is_told_too(model, monkeypatch):
    seen = {}
    monkeypatch.setattr("moresjax.evaluation.run.load_lm_eval_tasks", lambda *_, **__: ["task"])

    def run(lm, name, tasks, **options):
        seen.update(options)
        return {}, []

    monkeypatch.setattr("moresjax.evaluation.run.run_lm_eval_tasks", run)
    evaluate(model, ["some_task"], sampling=HOT)
    assert seen["sampling"] == HOT


def test_answers_have_the_length_that_the_evaluation_allows(model, tmp_path):
    options = {"tasks": load_benchmark("digits", limit=4)[:1], "out": tmp_path, "batch_size": 4}
    whole = evaluate(model, **options)
    short = evaluate(model, **options, max_new_tokens=1)
    (entry,) = short.scores.values()
    assert entry["max_new_tokens"] == 1
    firsts = [" ".join(row["prediction"].split()[:1]) for row in whole.predictions]
    assert [row["prediction"] for row in short.predictions] == firsts
    assert firsts != [row["prediction"] for row in whole.predictions]
    assert evaluate(model, **options).predictions == whole.predictions
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, got 0"):
        evaluate(model, **options, max_new_tokens=0)


def test_a_temperature_is_for_a_model(tmp_path, capsys):
    command = ["evaluate", "--tasks", "digits", "--predictions", "x.jsonl", "--temperature", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "scores answers that are there; it draws none" in capsys.readouterr().err
    command[-2:] = ["--max-new-tokens", "5"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "answers that are there, however long they are" in capsys.readouterr().err
    bad = ["evaluate", "--tasks", "digits", "--model", str(tmp_path), "--top-p", "0"]
    assert main([*bad, "--out", str(tmp_path / "out")]) == 2
    assert "top_p must be above 0" in capsys.readouterr().err


def test_a_judges_folder_computes_in_the_dtype_that_was_asked_for(monkeypatch):
    loaded = "moresjax.inference.load.load"
    monkeypatch.setattr(loaded, lambda folder, mesh, dtype: talking_model(dtype=dtype))
    options = {"judge_url": None, "judge_model": "runs/judge", "mesh": None}
    judge = command._judge(argparse.Namespace(**options, dtype="bfloat16"))
    assert (judge.name, judge.settings["dtype"]) == ("judge", "bfloat16")
    usual = command._judge(argparse.Namespace(**options, dtype="float32"))
    assert "dtype" not in usual.settings  # as cached replies of earlier versions have it
