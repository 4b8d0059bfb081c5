"""POPE against scikit-learn, MME by hand, and what wrong implementations get."""

import itertools
import random
import re

import pytest
from sklearn.metrics import precision_recall_fscore_support

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.yes_no import (
    COGNITION,
    PERCEPTION,
    mme_answer,
    mme_summary,
    pope_answer,
    pope_summary,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No", "no"),
        ("There is not, I think.", "no"),
        ("no, sir", "no"),
        ("Yes. But no cat.", "yes"),  # only the first sentence counts
        ("NO", "yes"),  # only these spellings count
        ("none", "yes"),
        ("There isn't one", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_answers_as_its_script_does(text, expected):
    assert pope_answer(text) == expected


def test_pope_scores_equal_scikit_learn():
    rng = random.Random(0)
    texts = rng.choices(["Yes", "No.", "There is no dog", "I see it", "yes, two"], k=200)
    labels = rng.choices(["yes", "no"], k=200)
    answers = [pope_answer(text) for text in texts]
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, answers, pos_label="yes", average="binary"
    )
    assert pope_summary(texts, labels) == pytest.approx(
        {
            "accuracy": sum(a == b for a, b in zip(answers, labels, strict=True)) / 200,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": answers.count("yes") / 200,
        }
    )


def test_pope_survives_a_model_that_never_says_yes():
    summary = pope_summary(["no"] * 4, ["yes", "no", "yes", "no"])
    expected = {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert summary == expected


def test_wrong_implementations_of_pope_are_told_apart():
    summary = pope_summary(["Yes, I see it."] * 4, ["yes", "yes", "no", "no"])
    assert summary["yes_ratio"] == 1, "not the share of yes among the labels"
    assert summary["accuracy"] == 0.5, "a sentence counts, not only the bare word"


def test_pope_names_bad_input():
    with pytest.raises(UserError, match="unknown POPE label 'maybe'"):
        pope_summary(["yes"], ["maybe"])
    with pytest.raises(UserError, match="got 0 for 1"):
        pope_summary([], ["yes"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("n", "other"),
        ("y", "other"),
        ("Y.", "other"),
        ("N.", "other"),
        (".no", "no"),
        ("..no", "no"),
        ("...no", "other"),
        (" yes, it is", "yes"),
        ("  yes, it is", "other"),
        ("y.es", "other"),
        ("No, it is not", "no"),
        ("not", "no"),
        ("The answer is yes", "other"),
        ("I know", "other"),
        ("a no", "no"),
        ("", "other"),
    ],
)
def test_mme_looks_at_four_characters(text, expected):
    assert mme_answer(text) == expected


def test_mme_reads_every_short_text_as_its_tool_does():
    # Facts about `eval_tool/calculation.py`: the column is lower-cased, nothing is stripped; yes
    # stands within the first four characters if it begins at the first or second one, no if it
    # begins at the first to third one; yes is looked for first.
    for letters in itertools.product("yesnoY. \n", repeat=5):
        text = "".join(letters)
        column = text.lower() + "\n"
        answer = "no" if re.match(r"(?s).{0,2}no", column) else "other"
        answer = "yes" if re.match(r"(?s).?yes", column) else answer
        assert mme_answer(text) == answer, text
        assert mme_answer(text[:3]) == mme_answer(text[:3] + "\n")


def mme_items(subtask: str, *hits: tuple[bool, bool]):
    for image, pair in enumerate(hits):
        for hit, label in zip(pair, ("Yes", "No"), strict=True):
            right, wrong = (label, {"Yes": "no", "No": "yes"}[label])
            yield subtask, f"{image}.jpg", right if hit else wrong, label


def test_mme_adds_accuracy_and_the_share_of_images_with_both_right():
    items = [
        *mme_items("existence", (True, True), (True, False)),
        *mme_items("OCR", (False, False)),
        *mme_items("code_reasoning", (True, True)),
    ]
    summary = mme_summary(items)
    assert summary["subtasks"]["existence"] == {"acc": 75.0, "acc_plus": 50.0, "score": 125.0}
    assert summary["perception"] == 125.0
    assert summary["cognition"] == 200.0
    assert mme_summary(reversed(items)) == summary


def test_a_perfect_model_gets_the_maximum_of_mme():
    summary = mme_summary(i for s in PERCEPTION + COGNITION for i in mme_items(s, (True, True)))
    assert (summary["perception"], summary["cognition"]) == (2000, 800)


def test_mme_names_bad_input():
    with pytest.raises(UserError, match="unknown MME subtask 'colour'"):
        mme_summary([("colour", "1.jpg", "yes", "Yes")])
    with pytest.raises(
        UserError, match=r"image 1.jpg of MME subtask color needs 2 questions, got 1"
    ):
        mme_summary([("color", "1.jpg", "yes", "Yes")])
