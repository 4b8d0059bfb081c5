"""POPE and HallusionBench of the digits world: what is asked, and what answers score."""

import numpy as np
import pytest

from moresjax.data.digits import WORDS
from moresjax.evaluation.benchmarks.digits_hallucination import look_alikes
from moresjax.evaluation.tasks import load_tasks


@pytest.fixture(scope="module")
def pairs():
    (task,) = load_tasks(["digits_hallusion"], None, 20, "test")
    return task


def test_an_exchanged_digit_turns_every_answer_round(pairs):
    by_set = {}
    for example in pairs.examples:
        row = example.metadata
        by_set.setdefault(row["set_id"], {})[row["figure_id"], row["question_id"]] = example
    for own in by_set.values():
        for question in "012":
            first, second = own["0", question], own["1", question]
            assert first.prompt == second.prompt
            assert {first.answer, second.answer} == {"yes", "no"}
        changed = (own["0", "0"].images[0] != own["1", "0"].images[0]).any(-1)
        assert changed.reshape(2, 16, 2, 16).any((1, 3)).sum() == 1  # one cell


def test_who_always_says_yes_gets_no_pair_right(pairs):
    truth = pairs.scorer(pairs.examples, [example.answer for example in pairs.examples])
    assert truth.details["qAcc"] == truth.details["fAcc"] == truth.details["hard aAcc"] == 100
    always = pairs.scorer(pairs.examples, ["yes"] * len(pairs.examples))
    assert np.mean(always.per_example) == 0.5
    assert always.details["qAcc"] == 0


def test_pope_asks_as_often_about_what_is_not_there():
    tasks = {task.name: task for task in load_tasks(["digits_pope"], None, 20, "test")}
    assert set(tasks) == {f"digits_pope_{kind}" for kind in ("random", "popular", "adversarial")}
    for task in tasks.values():
        answers = [example.answer for example in task.examples]
        assert answers.count("yes") == answers.count("no")
        always = task.scorer(task.examples, ["yes"] * len(answers))
        assert (always.details["recall"], always.details["yes_ratio"]) == (1.0, 1.0)
    adversarial = tasks["digits_pope_adversarial"].examples
    first = {"yes": [], "no": []}
    for example in adversarial:
        if example.id.split("-")[2] == "0":
            first[example.answer].append(WORDS.index(example.prompt.split()[-2]))
    distance = look_alikes()[:, first["yes"]].min(1)
    others = [d for d in range(10) if d not in first["yes"] + first["no"]]
    assert len(first["yes"]) == 3
    assert max(distance[first["no"]]) <= min(distance[others])
