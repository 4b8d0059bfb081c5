"""Random cases: logits and greedy tokens of `transformers` and `peft`, or refused in one sentence.

`benchmarks/same_as_references.py` runs as many as one likes, with more sizes.
"""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from moresjax.testing import references
from moresjax.testing.references import check_cases, other_token
from moresjax.weights.families import base

CASES = 300


def test_random_cases_are_equal_or_refused():
    outcomes = list(check_cases(CASES, seed=0, few_sizes=True, new=2))
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


def test_another_token_is_found(monkeypatch):
    generate = references.Engine.generate

    def other(*args):
        found = generate(*args)
        return dataclasses.replace(found, tokens=(found.tokens + 1) % references.IMAGE_ID)

    monkeypatch.setattr(references.Engine, "generate", other)
    kinds = Counter(outcome.kind for outcome in check_cases(6, seed=0, few_sizes=True))
    assert kinds["DIFFERENT"] >= 5


@pytest.mark.parametrize(
    ("ours", "found"),
    [
        ([2, 1, 0], None),
        ([2, 0, 5], None),  # as good as a tie; what follows says nothing
        ([2, 1, 1], "token 2 is 1, not 0, which leads by 5.0e-01"),
    ],
)
def test_ties_of_logits_are_no_difference(ours, found):
    logits = np.asarray([[0, 1, 9, 0, 0, 0], [4.0 - 1e-4, 4, 0, 0, 0, 0], [4, 2, 0, 0, 0, 0.0]])
    assert other_token(np.asarray(ours), np.asarray([2, 1, 0]), logits, 1e-4) == found
