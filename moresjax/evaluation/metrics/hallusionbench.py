"""HallusionBench: accuracy per question, per figure and per question pair.

Source: Guan et al. 2024 and the evaluation of `tianyi-lab/HallusionBench`. Every row is a yes/no
question about a figure, or about none; a judge says whether the answer is correct, incorrect or
unclear. Groups count as correct only as a whole. What the paper's table calls Hard is such a group
accuracy too.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from moresjax.core.errors import UserError

INCORRECT, CORRECT, UNCLEAR = 0, 1, 2
# The `visual_input` of a figure that was altered to contradict common knowledge.
_EDITED = "2"

Row = Mapping[str, object]


def parse_verdict(text: str) -> int:
    """The judge's verdict; what says neither correct nor incorrect is unclear.

    >>> parse_verdict("Incorrect.") == INCORRECT
    True
    """
    text = text.lower()
    if "incorrect" in text:
        return INCORRECT
    return CORRECT if "correct" in text else UNCLEAR


def rule_verdict(prediction: str, answer: str) -> int:
    """A verdict without a judge: a prediction with `yes` anywhere answers 1, any other answers 0.

    >>> rule_verdict("Yes, they are.", "1") == CORRECT
    True

    Args:
      prediction: The generated text.
      answer: The true answer, `0` or `1` (`gt_answer`).
    """
    return CORRECT if str(int("yes" in prediction.lower())) == answer else INCORRECT


def is_correct(row: Row, verdict: int) -> bool:
    """Whether a verdict is right; where a visual supplement lacks its figure, unclear is too."""
    return verdict == CORRECT or (verdict == UNCLEAR and _lacks_figure(row))


def hallusionbench_summary(rows: Sequence[Row], verdicts: Sequence[int]) -> dict[str, float]:
    """Percentages of the official table.

    Args:
      rows: The rows of `HallusionBench.json` (`category`, `subcategory`, `set_id`, `figure_id`,
        `question_id`, `visual_input`, `gt_answer`).
      verdicts: `CORRECT`, `INCORRECT` or `UNCLEAR` for every row.

    Returns:
      `aAcc` per row; `fAcc` per figure; `qAcc` per question over its figures; `easy aAcc` and
      `hard aAcc`: `qAcc` of unaltered and of altered figures; `yes_pct_diff`: predicted minus true
      share of yes; `yes_fp_ratio`: share of false yes among the errors. The last two are fractions.

    Raises:
      UserError: There are no rows, or not as many verdicts.
    """
    if not rows or len(rows) != len(verdicts):
        raise UserError(
            f"HallusionBench needs a verdict per question, got {len(verdicts)} for {len(rows)}"
        )
    hits = [is_correct(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]

    def groups(key: str, keep: Callable[[Row], bool]) -> float:
        found = defaultdict(list)
        for row, hit in zip(rows, hits, strict=True):
            if keep(row):
                names = ("category", "subcategory", "set_id", key)
                found[tuple(str(row[name]) for name in names)].append(hit)
        return 100 * sum(map(all, found.values())) / len(found) if found else 0.0

    truth = [str(row["gt_answer"]) == "1" for row in rows]
    predicted = sum(hit == yes for hit, yes in zip(hits, truth, strict=True))
    errors = [yes for hit, yes in zip(hits, truth, strict=True) if not hit]
    return {
        "aAcc": 100 * sum(hits) / len(hits),
        "fAcc": groups("figure_id", lambda row: not _lacks_figure(row)),
        "qAcc": groups("question_id", lambda row: True),
        "easy aAcc": groups("question_id", lambda row: str(row["visual_input"]) != _EDITED),
        "hard aAcc": groups("question_id", lambda row: str(row["visual_input"]) == _EDITED),
        "yes_pct_diff": (predicted - sum(truth)) / len(rows),
        "yes_fp_ratio": errors.count(False) / len(errors) if errors else 0.0,
    }


def _lacks_figure(row: Row) -> bool:
    return row["category"] == "VS" and str(row["figure_id"]) == "0"
