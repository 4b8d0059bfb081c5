"""VQA accuracy against values of the official tools, and its properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.vqa import (
    CONTRACTIONS,
    gqa_accuracy,
    m4c_accuracy,
    normalize_m4c,
    normalize_vqa,
    vqa_accuracy,
)


def people(**counts: int) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


# Scores of the official VQA tool and of the M4C evaluator, in percent.
GOLDEN = [
    (people(yes=10), "yes", 100, 100),
    (people(yes=10), "Yes", 0, 100),
    (people(yes=10), "yes.", 0, 100),
    (people(yes=9, no=1), "Yes.", 100, 100),
    (people(no=9, yes=1), "yes", 30, 30),
    (people(no=8, yes=2), "yes", 60, 60),
    (people(no=7, yes=3), "yes", 90, 90),
    (["2"] * 3 + ["two"] * 7, "two", 100, 100),
    (["2"] * 10, "two", 0, 100),
    (["none"] * 5 + ["0"] * 5, "zero", 100, 100),
    (["a red car"] * 4 + ["red car"] * 6, "the red car", 100, 100),
    (["1,000"] * 5 + ["1000"] * 5, "1,000", 100, 100),
    (["1,000"] * 10, "1000", 0, 100),
    (["3.5"] * 5 + ["3 5"] * 5, "3.5", 100, 100),
    (["t-shirt"] * 5 + ["t shirt"] * 5, "T-Shirt", 100, 100),
    (["yes, left"] * 6 + ["yes left"] * 4, "yes left", 100, 100),
    (people(unanswerable=6, cat=4), "Unanswerable", 100, 100),
]

answer = st.sampled_from(["yes", "no", "2", "two", "a cat", "cat", "t-shirt", "1,000", "left."])
ten_answers = st.lists(answer, min_size=10, max_size=10)


@pytest.mark.parametrize(("answers", "prediction", "official", "m4c"), GOLDEN)
def test_accuracy_equals_that_of_both_official_tools(answers, prediction, official, m4c):
    assert vqa_accuracy(prediction, answers) == pytest.approx(official / 100)
    assert m4c_accuracy(prediction, answers) == pytest.approx(m4c / 100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The 2 dogs.", "2 dogs"),
        ("a man's hat", "man 's hat"),
        ("1,000,000", "1000000"),
        ("yes/no", "yes no"),
        ("U.S.A.", "usa"),
        ("let's", "let 's"),
        ("wont", "won't"),
        ("a/b c", "b c"),
        ("-5", "5"),
        ("One, two", "1 2"),
        ("..5.", ".5"),
    ],
)
def test_m4c_normalisation_equals_the_original(text, expected):
    assert normalize_m4c(text) == expected


def test_both_normalisations_differ_at_possessives_and_commas():
    assert normalize_vqa("a man's hat") == "man's hat"
    # A digit comma anywhere deletes every mark, in the official tool only.
    assert normalize_vqa("1,000 t-shirts") == "1000 tshirts"
    assert normalize_m4c("1,000 t-shirts") == "1000 t shirts"
    assert normalize_vqa("." * 40) == "." * 8, "the tool removes at most 32 periods"


def test_the_contraction_table_forgets_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["couldn'tve"] == CONTRACTIONS["couldnt've"] == "couldn't've"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert "shed" not in CONTRACTIONS
    assert "im" not in CONTRACTIONS, "the tool lists it with a capital, which lower case never has"


def test_wrong_implementations_of_vqa_accuracy_are_told_apart():
    one_of_ten = people(no=9, yes=1)
    assert vqa_accuracy("yes", one_of_ten) != pytest.approx(1 / 3), "matches / 3 over all ten"
    assert vqa_accuracy("Yes", people(yes=10)) == 0, "normalised although all ten agree"


@given(ten_answers, answer, st.randoms())
@settings(max_examples=200, deadline=None)
def test_accuracy_is_one_of_five_values_and_ignores_order(answers, prediction, random):
    shuffled = random.sample(answers, len(answers))
    for accuracy in (vqa_accuracy, m4c_accuracy):
        score = accuracy(prediction, answers)
        assert min(abs(score - level) for level in (0, 0.3, 0.6, 0.9, 1)) < 1e-9
        assert accuracy(prediction, shuffled) == pytest.approx(score)


@given(ten_answers, st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_one_more_annotator_who_agrees_never_lowers_the_score(answers, i):
    better = [*answers[:i], "left.", *answers[i + 1 :]]
    assert m4c_accuracy("left", better) >= m4c_accuracy("left", answers) - 1e-9


def test_ten_answers_are_needed():
    for accuracy in (vqa_accuracy, m4c_accuracy):
        with pytest.raises(UserError, match="needs 10 answers per question, got 3"):
            accuracy("yes", ["yes"] * 3)


def test_gqa_ignores_case_and_a_final_period_but_no_other_punctuation():
    assert gqa_accuracy(" Left.", "left") == 1
    assert gqa_accuracy("left!", "left") == 0
    assert gqa_accuracy("to the left", "left") == 0
