"""Letters, ranks and labels: cases worked out by hand from the original scripts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.choices import (
    iconqa_correct,
    lowest_loss,
    mentioned_label,
    scienceqa_letter,
    scienceqa_summary,
    seed_correct,
    seed_summary,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B. a magnet", "B"),
        ("The answer is C.", "C"),
        ("Sure. The answer is D, I think", "D"),  # any character may follow the letter
        ("The answer is C", None),  # but one must
        ("The answer is A. The answer is B.", None),
        ("B.", None),
        ("F", None),
        ("AB", None),
        ("b", None),
        ("", None),
    ],
)
def test_scienceqa_letters_are_read_as_in_llava(text, expected):
    assert scienceqa_letter(text) == expected


def test_scienceqa_groups_overlap():
    problems = [
        {"subject": "natural science", "hint": "", "image": "image.png", "grade": "grade6"},
        {"subject": "natural science", "hint": "h", "image": "image.png", "grade": "grade7"},
        {"subject": "language science", "hint": "", "image": None, "grade": "grade12"},
    ]
    assert scienceqa_summary(problems, [True, False, True]) == pytest.approx(
        {
            "NAT": 50,
            "LAN": 100,
            "TXT": 0,
            "IMG": 50,
            "NO": 100,
            "G1-6": 100,
            "G7-12": 50,
            "Average": 200 / 3,
        }
    )
    with pytest.raises(UserError, match="got 1 for 3"):
        scienceqa_summary(problems, [True])


def test_seed_bench_wants_the_bare_letter_or_ranks_losses():
    assert seed_correct("B ", "B")
    assert not seed_correct("B.", "B")
    assert lowest_loss([1.5, 0.25, 0.25, 3.0]) == 1
    items = [
        ("Scene Understanding", "image", True),
        ("Scene Understanding", "image", False),
        ("Action Prediction", "video", True),
    ]
    assert seed_summary(items) == pytest.approx(
        {
            "Scene Understanding": 50,
            "Action Prediction": 100,
            "image": 50,
            "video": 100,
            "total": 200 / 3,
        }
    )
    with pytest.raises(UserError, match="at least one choice"):
        lowest_loss([])


def test_iconqa_is_exact_equality_and_not_edit_distance():
    assert iconqa_correct(" 12\n", 12)
    assert iconqa_correct("the bear", "the bear")
    # A normalised edit distance would give these 0.9 and 0.5.
    assert not iconqa_correct("the bears", "the bear")
    assert not iconqa_correct("13", "12")


LABELS = ["entailment", "neutral", "contradiction"]


@given(st.sampled_from(LABELS), st.sampled_from(["{}", "It is {}.", "{}!", "Answer: '{}'"]))
@settings(deadline=None)
def test_a_single_mentioned_label_is_found_in_any_case(label, sentence):
    assert mentioned_label(sentence.format(label.upper()), LABELS) == label


def test_no_or_several_labels_are_no_answer():
    assert mentioned_label("neutral or contradiction", LABELS) is None
    assert mentioned_label("I cannot tell", LABELS) is None
    assert mentioned_label("a pineapple", ["apple", "pear"]) is None
