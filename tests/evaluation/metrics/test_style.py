"""Counts of steered answers, by hand."""

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.style import (
    accuracy_by_answer_type,
    answer_type_counts,
    majority_types,
    matches_of_three,
    target_counts,
)
from moresjax.evaluation.metrics.vqa import vqa_accuracy


def test_counts_of_target_and_source_words():
    counts = target_counts(
        predictions=["A RED car", "a colored kite", "a blue sky ", "a green tree"],
        references=[["a blue car", "a car"], ["a kite"], ["a blue sky"], ["a tree"]],
        baseline=["a blue car", "a kite", "A blue sky", "a tree"],
        target_words=["red"],
        source_words=["Blue"],
    )
    assert counts == {
        "num_preds_with_toi": 2,  # "colored" contains "red"
        "num_preds_and_targets_with_toi": 1,
        "num_preds_and_baseline_preds_with_toi": 1,
        "num_preds_changed": 3,
    }
    with pytest.raises(UserError, match="got 1, 1 and 0"):
        target_counts(["a"], [["a"]], [], [], [])


def test_three_matches_of_all_answers_are_full_score():
    answers = ["no"] * 8 + ["the yes", "yes"]
    assert matches_of_three("Yes.", answers) == pytest.approx(2 / 3)
    assert vqa_accuracy("Yes.", answers) == pytest.approx(0.6), "the official score differs"
    assert matches_of_three("t-shirt", ["t-shirt"] * 10) == 0, "answers keep their hyphens"


def test_overall_is_the_mean_over_types_not_items():
    scores, types = [1.0, 1.0, 1.0, 0.0], ["yes/no", "yes/no", "yes/no", "number"]
    expected = {"yes/no": 100.0, "number": 0.0, "overall": 50.0}
    assert accuracy_by_answer_type(scores, types) == expected
    with pytest.raises(UserError, match="got 0 types for 1"):
        accuracy_by_answer_type([1.0], [])


def test_answers_have_the_type_they_mostly_had_in_training():
    types = majority_types({"yes/no": ["yes", "no", "red"], "other": ["red", "red"]})
    assert types == {"yes": "yes/no", "no": "yes/no", "red": "other"}
    predictions = ["Yes.", "red", "two", "3.5", "blue"]
    expected = {"yes/no": 1, "other": 1, "number": 2, "unrecognized": 1}
    assert answer_type_counts(predictions, types) == expected
