"""Styles of captions and types of answers, by hand."""

import pytest

from moresjax.data.word_lists import word_list
from moresjax.evaluation.metrics.answer_types import answer_type, type_counts, type_map
from moresjax.evaluation.metrics.style import has_word, style_counts
from moresjax.evaluation.metrics.vqa import matches_of_three, vqa_accuracy


def test_words_of_a_list_are_counted_by_caption_and_by_use():
    captions = ["A red bus, a RED car and a blue sky.", "Two dogs.", "tired; in the living room"]
    found = style_counts(captions, ["red", "blue", "living room", "green"])
    assert (found.captions, found.words) == (2, 4)
    assert found.by_word == {"blue": 1, "living room": 1, "red": 1}
    assert style_counts([], ["red"]).captions == 0
    assert has_word("An orange cat", word_list("colors"))
    assert not has_word("A bored cat", ["red"])


def test_an_answer_has_the_type_of_most_of_its_questions():
    types = type_map(
        [("Yes", "yes/no"), ("no", "yes/no"), ("2", "number"), ("two", "other"), ("red", "other")]
    )
    assert types == {"yes": "yes/no", "no": "yes/no", "2": "number", "red": "other"}
    assert answer_type("Two", types) == "number"
    counts = type_counts(["YES", "no.", "2", "mauve"], types)
    assert counts == {"number": 1, "other": 0, "yes/no": 2, "unrecognised": 1}


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (9, 1)])
def test_matches_of_three(matches, score):
    answers = ["blue"] * matches + ["red"] * (10 - matches)
    assert matches_of_three("Blue", answers) == pytest.approx(score)
    assert vqa_accuracy("blue", answers) <= score + 1e-9
