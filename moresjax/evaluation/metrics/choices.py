"""Choosing among given answers: ScienceQA, SEED-Bench, IconQA, and labels in general.

- ScienceQA: letters as LLaVA's `eval_science_qa.py` reads them; groups of the official tool
  (Lu et al. 2022, `lupantech/ScienceQA`).
- SEED-Bench (Li et al. 2023): a generated letter (LLaVA), or the choice of lowest loss (official).
- IconQA (Lu et al. 2021): equality with the answer's text (LLaVA Steering).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from moresjax.core.errors import UserError

_LETTERS = "ABCDE"
# One more character must follow the letter: the period of the original pattern is not escaped.
_SCIENCEQA_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
_LAST_LOWER_GRADE = 6


def scienceqa_letter(text: str) -> str | None:
    """The letter of an answer `B`, `B. text` or `The answer is B.`; None for anything else.

    >>> scienceqa_letter("B. a magnet"), scienceqa_letter("It is B")
    ('B', None)
    """
    if text and text in tuple(_LETTERS):
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SCIENCEQA_SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa_summary(problems: Sequence[Mapping], hits: Sequence[bool]) -> dict[str, float]:
    """Percentages of the official table, for the groups that have problems.

    Args:
      problems: Entries of `problems.json` (`subject`, `hint`, `image`, `grade`).
      hits: For every problem whether its answer was right.

    Returns:
      `Average`; by subject `NAT`, `SOC`, `LAN`; by context `TXT`, `IMG` (ScienceQA-IMG), `NO`; by
      grade `G1-6`, `G7-12`.

    Raises:
      UserError: There are no problems, or not as many hits.
    """
    if not problems or len(problems) != len(hits):
        raise UserError(f"ScienceQA needs a hit per problem, got {len(hits)} for {len(problems)}")
    groups = defaultdict(list)
    for problem, hit in zip(problems, hits, strict=True):
        grade = int(str(problem["grade"]).removeprefix("grade"))
        member = {
            **{name: problem["subject"] == subject for name, subject in _SUBJECTS.items()},
            "TXT": bool(problem["hint"]),
            "IMG": bool(problem["image"]),
            "NO": not problem["hint"] and not problem["image"],
            "G1-6": grade <= _LAST_LOWER_GRADE,
            "G7-12": grade > _LAST_LOWER_GRADE,
            "Average": True,
        }
        for name, belongs in member.items():
            if belongs:
                groups[name].append(hit)
    return {name: _percent(values) for name, values in groups.items()}


def seed_correct(text: str, answer: str) -> bool:
    """Whether the generated text is the letter of the answer and nothing else.

    >>> seed_correct("C ", "C"), seed_correct("C.", "C")
    (True, False)
    """
    return text.strip() == answer


def lowest_loss(losses: Sequence[float]) -> int:
    """The index of the choice with the lowest loss (SEED-Bench's ranking); the first of equal ones.

    >>> lowest_loss([1.5, 0.25, 0.25])
    1

    Raises:
      UserError: There are no choices.
    """
    if not losses:
        raise UserError("ranking needs at least one choice, got none")
    return min(range(len(losses)), key=losses.__getitem__)


def seed_summary(items: Iterable[tuple[str, str, bool]]) -> dict[str, float]:
    """Percentages per question type, `image`, `video` and `total`.

    Args:
      items: For every question its type, `image` or `video`, and whether its answer was right.
    """
    groups = defaultdict(list)
    for question_type, data_type, hit in items:
        for name in (question_type, data_type, "total"):
            groups[name].append(hit)
    return {name: _percent(values) for name, values in groups.items()}


def iconqa_correct(text: str, answer: str | int) -> bool:
    """Whether the text is the answer's, up to surrounding blanks.

    >>> iconqa_correct(" 12", 12)
    True
    """
    return text.strip() == str(answer)


def mentioned_label(text: str, labels: Sequence[str]) -> str | None:
    """The one label a text mentions as whole words, whatever its case; None for none or several.

    This rule stands in for a judge on VSR, SNLI-VE, CIFAR and MNIST.

    >>> mentioned_label("It is a Cat.", ["cat", "dog"])
    'cat'
    """
    found = {
        label
        for label in labels
        if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE)
    }
    return found.pop() if len(found) == 1 else None


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values)
