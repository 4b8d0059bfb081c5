"""HallusionBench's groups, by hand and by brute force."""

import random

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.hallusionbench import (
    CORRECT,
    INCORRECT,
    UNCLEAR,
    hallusionbench_summary,
    parse_verdict,
    rule_verdict,
)


def row(category, figure, question, visual_input, answer="1", set_id="0") -> dict[str, str]:
    return {
        "category": category,
        "subcategory": "chart",
        "set_id": set_id,
        "figure_id": figure,
        "question_id": question,
        "visual_input": visual_input,
        "gt_answer": answer,
    }


ROWS = [
    row("VS", "0", "0", "0", "1"),  # no figure
    row("VS", "1", "0", "1", "1"),
    row("VS", "2", "0", "2", "0"),
    row("VD", "0", "0", "1", "1"),
    row("VD", "0", "1", "1", "0"),
    row("VD", "1", "0", "2", "0"),
]


def test_every_score_counts_its_own_groups():
    verdicts = [UNCLEAR, CORRECT, INCORRECT, CORRECT, UNCLEAR, CORRECT]
    assert hallusionbench_summary(ROWS, verdicts) == pytest.approx(
        {
            "aAcc": 100 * 4 / 6,  # not knowing is right without a figure, wrong with one
            "fAcc": 100 * 2 / 4,  # VS figures 1, 2 and VD figures 0, 1: right are VS 1 and VD 1
            "qAcc": 100 * 1 / 3,  # questions VS 0, VD 0, VD 1: right is VD 0
            "easy aAcc": 100 * 2 / 3,  # VS 0, VD 0, VD 1 without altered figures
            "hard aAcc": 100 * 1 / 2,  # VS 0 and VD 0 with altered figures only
            "yes_pct_diff": (5 - 3) / 6,  # three true yes and two false
            "yes_fp_ratio": 1.0,  # both errors have the true answer no
        }
    )


def random_rows(rng: random.Random) -> list[dict[str, str]]:
    return [
        row(category, str(figure), str(question), str(min(figure, 2)), rng.choice("01"), str(s))
        for category in ("VS", "VD")
        for s in range(4)
        for figure in range(3)
        for question in range(3)
        if rng.random() < 0.8
    ]


def test_group_scores_equal_brute_force_in_any_order():
    rng = random.Random(1)
    for _ in range(20):
        rows = random_rows(rng)
        verdicts = rng.choices([CORRECT, INCORRECT, UNCLEAR], [6, 1, 1], k=len(rows))

        def right(i, rows=rows, verdicts=verdicts):
            no_figure = rows[i]["category"] == "VS" and rows[i]["figure_id"] == "0"
            return verdicts[i] == CORRECT or (no_figure and verdicts[i] == UNCLEAR)

        def same_question(i, j, rows=rows):
            return all(rows[i][k] == rows[j][k] for k in ("category", "set_id", "question_id"))

        hard = [i for i, r in enumerate(rows) if r["visual_input"] == "2"]
        groups = {frozenset(j for j in hard if same_question(i, j)) for i in hard}
        expected = 100 * sum(all(map(right, group)) for group in groups) / len(groups)
        summary = hallusionbench_summary(rows, verdicts)
        assert summary["hard aAcc"] == pytest.approx(expected)
        order = rng.sample(range(len(rows)), len(rows))
        shuffled = hallusionbench_summary([rows[i] for i in order], [verdicts[i] for i in order])
        assert shuffled == pytest.approx(summary)


def test_wrong_implementations_of_the_groups_are_told_apart():
    # Same ids in both categories: grouping without the category merges two questions into one.
    rows = [row("VS", "1", "0", "2"), row("VD", "1", "0", "2")]
    assert hallusionbench_summary(rows, [CORRECT, INCORRECT])["hard aAcc"] == 50
    # Hard accuracy is over questions, not single rows.
    rows = [row("VD", str(figure), "0", "2") for figure in (1, 2, 3, 4)]
    summary = hallusionbench_summary(rows, [CORRECT, CORRECT, CORRECT, INCORRECT])
    assert (summary["hard aAcc"], summary["aAcc"]) == (0, 75)


def test_verdicts_are_read_from_the_judge_or_from_a_rule():
    replies = ["Incorrect.", "The prediction is correct", "unclear", "?"]
    assert [parse_verdict(r) for r in replies] == [INCORRECT, CORRECT, UNCLEAR, UNCLEAR]
    assert rule_verdict("Yes, it is.", "1") == rule_verdict("I doubt it", "0") == CORRECT
    assert rule_verdict("yes", "0") == INCORRECT


def test_a_missing_verdict_is_an_error():
    with pytest.raises(UserError, match="got 1 for 6"):
        hallusionbench_summary(ROWS, [CORRECT])
