"""Yes/no benchmarks: POPE and MME.

- POPE: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models" and its
  evaluation script (`RUCAIBox/POPE`, the same in LLaVA).
- MME: Fu et al. 2023 and its `eval_tool/calculation.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from moresjax.core.errors import UserError, choice_error

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_QUESTIONS_PER_IMAGE = 2  # MME counts them together.
_MME_PREFIX = 4  # MME looks for the answer in so many characters.


def pope_answer(text: str) -> str:
    """`no` if the first sentence has the word No, no or not; `yes` for everything else.

    >>> pope_answer("There is no dog."), pope_answer("A dog. It is not large.")
    ('no', 'yes')
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_summary(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Scores of one split, as fractions; `yes` is the positive class.

    >>> scores = pope_summary(["Yes", "Yes", "No"], ["yes", "no", "no"])
    >>> scores["precision"], scores["recall"]
    (0.5, 1.0)

    Args:
      texts: Generated answers.
      labels: For every answer the true one, `yes` or `no`.

    Returns:
      `accuracy`, `precision`, `recall`, `f1`, and `yes_ratio`, the share of predicted yes; a ratio
      without cases is 0.

    Raises:
      UserError: A label is neither, there are none, or not as many answers.
    """
    if len(texts) != len(labels) or not texts:
        raise UserError(f"POPE needs an answer per label, got {len(texts)} for {len(labels)}")
    for label in labels:
        if label not in ("yes", "no"):
            raise choice_error("POPE label", label, ("yes", "no"))
    answers = [pope_answer(text) for text in texts]
    pairs = list(zip(answers, labels, strict=True))
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    true_no, false_no = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision = _ratio(true_yes, true_yes + false_yes)
    recall = _ratio(true_yes, true_yes + false_no)
    return {
        "accuracy": _ratio(true_yes + true_no, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(true_yes + false_yes, len(pairs)),
    }


def _ratio(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 0.0


def mme_answer(text: str) -> str:
    """`yes`, `no` or `other`, from the first four characters, blanks and dots included.

    >>> mme_answer("Yes, it is."), mme_answer("I think so"), mme_answer("Y.")
    ('yes', 'other', 'other')
    """
    start = text.lower()[:_MME_PREFIX]
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def mme_summary(items: Iterable[tuple[str, str, str, str]]) -> dict:
    """MME scores.

    Args:
      items: For every question its subtask, image, generated text and label; every image of a
        subtask has two questions.

    Returns:
      `subtasks`: by name `acc` and `acc_plus` in percent and their sum `score` (at most 200);
      `perception` and `cognition`: sums of the scores of their subtasks (at most 2000 and 800).

    Raises:
      UserError: A subtask is unknown, or an image does not have two questions.
    """
    correct: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for subtask, image, text, label in items:
        if subtask not in PERCEPTION + COGNITION:
            raise choice_error("MME subtask", subtask, PERCEPTION + COGNITION)
        correct[subtask][image].append(mme_answer(text) == label.lower())
    subtasks = {}
    for subtask, images in correct.items():
        for image, hits in images.items():
            if len(hits) != _QUESTIONS_PER_IMAGE:
                raise UserError(
                    f"image {image} of MME subtask {subtask} needs {_QUESTIONS_PER_IMAGE} "
                    f"questions, got {len(hits)}"
                )
        total = _QUESTIONS_PER_IMAGE * len(images)
        acc = 100 * sum(map(sum, images.values())) / total
        acc_plus = 100 * sum(map(all, images.values())) / len(images)
        subtasks[subtask] = {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}

    def total_of(names: Sequence[str]) -> float:
        return sum((subtasks[name]["score"] for name in names if name in subtasks), 0.0)

    return {
        "subtasks": subtasks,
        "perception": total_of(PERCEPTION),
        "cognition": total_of(COGNITION),
    }
