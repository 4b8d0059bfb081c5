"""Random cases: equal to `transformers` and `peft`, or refused in one sentence.

`benchmarks/same_as_references.py` runs as many as one likes, with more sizes.
"""

from collections import Counter

from moresjax.testing.references import check_cases
from moresjax.weights.families import base

CASES = 40


def test_random_cases_are_equal_or_refused():
    outcomes = list(check_cases(CASES, seed=0, few_sizes=True))
    counts = Counter(outcome.kind for outcome in outcomes)
    assert [o for o in outcomes if o.kind in ("DIFFERENT", "crash")] == []
    assert counts["equal"] >= CASES // 2
    refused = [outcome for outcome in outcomes if outcome.kind == "refused"]
    assert all(len(outcome.detail) > 20 and "\n" not in outcome.detail for outcome in refused)
    assert any(" with " in outcome.what for outcome in outcomes if outcome.kind == "equal")
    assert any("llava" in outcome.what for outcome in outcomes if outcome.kind == "equal")


def test_a_silent_difference_is_found(monkeypatch):
    monkeypatch.setattr(base, "ACTIVATIONS", dict.fromkeys(base.ACTIVATIONS, "gelu_tanh"))
    kinds = Counter(outcome.kind for outcome in check_cases(8, seed=0, few_sizes=True))
    assert kinds["DIFFERENT"] >= 2
