"""MMMU's parser against the copy of the official one in `lm_eval`, and its averages."""

import random

import pytest
from lm_eval.tasks.mmmu import utils as official

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.mmmu import (
    DOMAINS,
    SEED,
    find_option,
    is_open_correct,
    mmmu_summary,
    parse_multi_choice,
    parse_open,
    subject_of,
)

OPTIONS = {"A": "red", "B": "the answer", "C": "12%", "D": "car"}
PIECES = (
    "the answer is so = therefore thus final result could be 3.5 1,200 4e3 -7 . \n A B (A) (B) (D)"
    " C , ? a red car . So it's 12% x=3 : ' $5 .5 B. 3.50 (C)"
)
TRUTHS = ["a red car", "3.5", "1,200", "A", "7", ["car", "12"], "x", ["A", "-7"]]


def responses(count: int):
    rng = random.Random(0)
    pieces = PIECES.split(" ")
    for _ in range(count):
        yield rng, " ".join(rng.choices(pieces, k=rng.randint(0, 9)))


def test_choices_equal_the_official_parser_and_its_random_fallback():
    guesses = 0
    ours = random.Random(SEED)
    official.random.seed(SEED)
    for _, response in responses(5000):
        expected = official.parse_multi_choice_response(response, list(OPTIONS), OPTIONS)
        assert parse_multi_choice(response, OPTIONS, ours) == expected, response
        guesses += find_option(response, OPTIONS) is None
    assert 500 < guesses < 4500, "the responses cover both ways"


def test_open_answers_equal_the_official_parser_and_judgement():
    right = 0
    for rng, response in responses(5000):
        expected = official.parse_open_response(response)
        candidates = parse_open(response)
        assert candidates == set(expected), response
        truth = rng.choice(TRUTHS)
        assert is_open_correct(candidates, truth) == official.eval_open(truth, expected)
        right += is_open_correct(candidates, truth)
    assert 300 < right < 4700, "the responses cover both outcomes"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("(C).", "C"),
        ("It is A or rather D !", "D"),
        ("Not (A) but (B), A", "B"),
        ("I would say that it is the car", "D"),
        ("the car", None),
        ("", None),
    ],
)
def test_the_last_option_mentioned_is_the_choice(response, expected):
    assert find_option(response, OPTIONS) == expected


def test_numbers_are_compared_to_two_digits():
    assert is_open_correct(parse_open("so x = 3.141"), "3.14")
    assert not is_open_correct(parse_open("so x = 3.16"), "3.2")


def test_the_same_seed_makes_the_same_guesses():
    first, second = (
        [parse_multi_choice("?", OPTIONS, rng) for _ in range(50)]
        for rng in (random.Random(SEED), random.Random(SEED))
    )
    assert first == second
    assert set(first) == set(OPTIONS)


def test_averages_weigh_items_not_subjects():
    hits = {"Art": [True] * 3, "Music": [False], "Math": [True, False, False, False]}
    assert mmmu_summary(hits) == {
        "Art": 1.0,
        "Music": 0.0,
        "Math": 0.25,
        "Art and Design": 0.75,
        "Science": 0.25,
        "Overall": 0.5,
    }
    assert sum(map(len, DOMAINS.values())) == 30
    assert (
        subject_of("validation_Architecture_and_Engineering_12") in DOMAINS["Tech and Engineering"]
    )


def test_unknown_and_empty_subjects_are_errors():
    with pytest.raises(UserError, match="unknown MMMU subject 'Arts'"):
        mmmu_summary({"Arts": [True]})
    with pytest.raises(UserError, match="MMMU subject Art has no questions"):
        mmmu_summary({"Art": []})
