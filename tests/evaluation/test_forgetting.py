"""`evaluate --forgetting`: the same questions before and after tuning, side by side."""

import json
from pathlib import Path

import pytest

from moresjax.cli import main
from moresjax.evaluation.forgetting import forgetting, forgetting_facts, forgetting_table
from moresjax.evaluation.paired import OF_ONE_SEED
from moresjax.evaluation.results import EvaluationResult, write_results

BASE = str(Path(__file__).parents[1] / "fixtures" / "v0_1" / "base")
ASK = ["evaluate", "--model", BASE, "--limit", "2", "--batch-size", "12", "--out"]


@pytest.mark.parametrize(("positions", "same"), [("image", True), ("all", False)])
def test_mores_on_images_leaves_text_as_it_was_to_the_bit(positions, same, tmp_path, capsys):
    command = [*ASK, str(tmp_path), "--tasks", "digits_text", "--forgetting", BASE]
    assert main([*command, "--tuning", f"mores:rank=2,positions={positions}"]) == 0
    printed = capsys.readouterr().out
    assert f"images {'are bit-equal to' if same else 'differ from'} those before" in printed
    facts = json.loads((tmp_path / "forgetting.json").read_text())
    assert facts["logits_bit_equal"] == same
    assert len(facts["tasks"]) == 6
    before = json.loads((tmp_path / "before" / "results.json").read_text())
    after = json.loads((tmp_path / "results.json").read_text())
    for row in facts["tasks"]:
        assert row["before"] == before["scores"][row["task"]]["score"]
        assert row["after"] == after["scores"][row["task"]]["score"]
        assert row["n"] == 2
        assert f"\n{row['task']}" in printed
        assert not (same and row["changed"])


def result_of(scores: list[float], answers: str, model: str) -> EvaluationResult:
    rows = [
        {"task": "t", "id": str(n), "prompt": f"{n} ?", "prediction": answer, "score": score}
        for n, (score, answer) in enumerate(zip(scores, answers, strict=True))
    ]
    entry = {"benchmark": "t", "score": sum(scores) / len(scores), "n": len(rows)}
    return EvaluationResult({"t": entry}, rows, model=model)


def test_what_is_lower_is_said_by_a_paired_interval(tmp_path):
    before = result_of([1.0] * 10, "a" * 10, "one")
    after = result_of([0.0] * 8 + [1.0] * 2, "b" * 8 + "aa", "two")
    write_results(before, tmp_path / "before")
    write_results(after, tmp_path)
    (row,) = forgetting(before, after, tmp_path)
    assert (row.before, row.after, row.n, row.changed) == (1.0, 0.2, 10, 8)
    text = forgetting_table(json.loads(json.dumps(forgetting_facts([row], None))))
    assert text.splitlines()[1].startswith("t ")
    assert "1.000    0.200  -80.0, 95% in -100.0 to -50.0: lower; 8 of 10 answers chang" in text
    assert text.splitlines()[2] == OF_ONE_SEED
    assert "logits" not in text


def test_a_base_that_cannot_be_is_refused_before_anything_is_asked(tmp_path, capsys):
    out, lost = str(tmp_path / "out"), str(tmp_path / "lost")
    assert main([*ASK, out, "--tasks", "digits_text", "--forgetting", lost]) == 2
    assert lost in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    saved = ["evaluate", "--predictions", "x.jsonl", "--tasks", "digits", "--out", out]
    assert main([*saved, "--forgetting", BASE]) == 2
    assert "without a model" in capsys.readouterr().err
