"""CHAIR by hand, on a list of objects in the official format."""

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.chair import (
    caption_words,
    chair_summary,
    mentioned_objects,
    parse_synonyms,
    vocabulary_lemmatizer,
)

SYNONYMS = parse_synonyms(
    """\
person, man, woman, child, baby, passenger, people
bird, goose
elephant
bus, minibus
train, locomotive
motorcycle, scooter,  motor bike, motorbike
tie, bow, bow tie
skis, ski
wine glass
knife
bench
puppy
dining table, table
hot dog
dog
bicycle, bike
chair, seat
toilet
"""
)
SINGULAR = vocabulary_lemmatizer(SYNONYMS)


def objects(caption: str) -> list[str]:
    return mentioned_objects(caption_words(caption, SYNONYMS, SINGULAR), SYNONYMS)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two men and a woman with skis.", ["person", "person", "skis"]),
        ("geese, buses, knives, benches and puppies", ["bird", "bus", "knife", "bench", "puppy"]),
        ("wine glasses on the dining table", ["wine glass", "dining table"]),
        ("a baby elephant", ["elephant"]),
        ("a baby, elephant", ["person", "elephant"]),
        ("a passenger train on the train tracks", ["train"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("a hot dog, no dog", ["hot dog", "dog"]),
        ("hot, dog", ["dog"]),
        ("the seat of the toilet", ["toilet"]),
        ("the seat", ["chair"]),
        ("a toilet seat", ["toilet"]),
        # The blank before this synonym in the official list keeps it from matching.
        ("a motor bike and a bike", ["bicycle"]),
        ("a class of glass", []),
    ],
)
def test_objects_are_found_as_in_the_original(caption, expected):
    assert objects(caption) == expected


def test_another_lemmatiser_finds_other_objects():
    without = mentioned_objects(caption_words("two men", SYNONYMS, lambda word: word), SYNONYMS)
    assert without == []
    assert objects("two men") == ["person"]


def test_shares_count_mentions_captions_and_true_objects():
    captions = ["a dog and a man, a man", "a bus", "nothing here"]
    words = [caption_words(caption, SYNONYMS, SINGULAR) for caption in captions]
    truths = [{"person", "bench"}, {"bus"}, {"train"}]
    summary = chair_summary(words, truths, SYNONYMS)
    assert summary == pytest.approx(
        {"CHAIRs": 1 / 3, "CHAIRi": 1 / 4, "Recall": 2 / 4, "Len": (8 + 2 + 2) / 3}
    )
    backwards = chair_summary(words[::-1], truths[::-1], SYNONYMS)
    assert backwards == pytest.approx(summary)


def test_captions_without_objects_hallucinate_nothing():
    summary = chair_summary([["hello"]], [set()], SYNONYMS)
    assert summary == {"CHAIRs": 0, "CHAIRi": 0, "Recall": 0, "Len": 1}


def test_missing_lists_are_errors():
    with pytest.raises(UserError, match="synonyms are empty"):
        parse_synonyms("\n")
    with pytest.raises(UserError, match="got 0 for 1"):
        chair_summary([["a"]], [], SYNONYMS)
