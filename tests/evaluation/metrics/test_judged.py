"""What is made of a judge's replies, by hand."""

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.judge_prompts import PROMPTS, fill, prompt_hash
from moresjax.evaluation.metrics.judged import (
    mm_vet_answer,
    mm_vet_summary,
    mmhal_summary,
    parse_mm_vet,
    parse_mmhal,
    rule_mm_vet,
    rule_mrt,
)

FIELDS = {
    "question": "What is {answer}?",
    "answer": "cat",
    "prediction": "a {question}",
    "image_content": "cat, sofa",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_take_every_field_once_and_leave_braces_of_the_fields_alone(name):
    prompt = fill(PROMPTS[name], **FIELDS)
    assert prompt.count("What is {answer}?") == 1
    assert prompt.count("a {question}") == 1
    assert ("cat, sofa" in prompt) == (name == "mmhal")


def test_prompts_are_told_apart_by_their_hash():
    assert len({prompt_hash(text) for text in PROMPTS.values()}) == len(PROMPTS)
    # SHA-256 of "abc", FIPS 180-2.
    assert prompt_hash("abc") == "ba7816bf8f01"
    with pytest.raises(UserError, match="needs 'image_content'; given are: question"):
        fill(PROMPTS["mmhal"], question="q")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("0.5", 0.5), ("1.0 because", 1.0), ("0\n", 0.0), ("1.1", None), ("good", None), ("", None)],
)
def test_mm_vet_takes_the_first_word_as_the_score(reply, expected):
    assert parse_mm_vet(reply) == expected


def test_mm_vet_averages_by_capability_and_combination():
    scores = {"v1_0": [1.0, 0.0], "v1_1": [0.5, 0.5], "v1_2": [0.0, 0.2]}
    capabilities = {"v1_0": ["ocr", "math"], "v1_1": ["math"], "v1_2": {"math", "ocr"}}
    assert mm_vet_summary(scores, capabilities) == {
        "math": 36.7,
        "ocr": 30.0,
        "math_ocr": 30.0,
        "only_math": 50.0,
        "total": 36.7,  # 50 and 23.3 in the two runs
        "std": 13.3,
    }
    for ragged in ({}, {"v1_0": []}, {"v1_0": [1.0], "v1_1": [1.0, 1.0]}):
        with pytest.raises(UserError, match="same number of judge runs"):
            mm_vet_summary(ragged, {"v1_0": ["ocr"], "v1_1": ["ocr"]})


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("... Rating: 4", 4),
        ("RATING: 6, very informative", 6),
        ("Rating: 2 or rating: 3", 0),
        ("I give it a 5", 0),
        ("Rating: 7", 0),
    ],
)
def test_mmhal_wants_exactly_one_rating(reply, expected):
    assert parse_mmhal(reply) == expected


def test_mmhal_calls_ratings_below_three_hallucinations():
    types = ["attribute", "relation", "attribute", "relation"]
    assert mmhal_summary([6, 3, 2, 0], types) == {
        "average_score": 2.75,
        "hallucination_rate": 0.5,
        "attribute": 4.0,
        "relation": 1.5,
    }
    with pytest.raises(UserError, match="0 to 6, got 7"):
        mmhal_summary([7], ["attribute"])
    with pytest.raises(UserError, match="got 0 for 1"):
        mmhal_summary([1], [])


def test_rules_stand_in_for_a_judge():
    assert mm_vet_answer("-1<AND>-5") == "-1 <AND> -5"
    assert rule_mm_vet("x = -5 or 5", "-1<AND>-5") == 0.5
    assert rule_mm_vet("A Kitten", "cat<AND>dog<OR>kitten") == 1
    assert rule_mrt("It is a Ship.", "ship") == "Yes"
    assert rule_mrt("a spaceship", "ship") == "No"
