"""What steering did to the answers: words of a target concept, and accuracy by answer type.

Source: Khayatan et al. 2025, "Analyzing Fine-tuning Representation Shift for Multimodal LLMs
Steering", and `mshukor/xl-vlms`. Words are found as substrings: "red" is in "colored" too.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.vqa import normalize_m4c, plain_words

UNRECOGNIZED = "unrecognized"


def _clean(text: str) -> str:
    return text.lower().strip()


def _has_any(text: str, words: Iterable[str]) -> bool:
    return any(_clean(word) in _clean(text) for word in words)


def target_counts(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str],
    target_words: Sequence[str],
    source_words: Sequence[str],
) -> dict[str, int]:
    """How often steering towards target words, away from source words, worked.

    Args:
      predictions: of the steered model.
      references: true answers or captions per item.
      baseline: predictions of the unsteered model, in the same order.
      target_words: words the steering aims at.
      source_words: words it leads away from.

    Returns:
      `num_preds_with_toi`: predictions with a target word (token of interest); of these,
        `num_preds_and_targets_with_toi`: those whose references have a source word;
        `num_preds_and_baseline_preds_with_toi`: those whose baseline prediction has one.
      `num_preds_changed`: predictions that differ from the baseline's.

    Raises:
      UserError: for different numbers of items.
    """
    if not len(predictions) == len(references) == len(baseline):
        raise UserError(
            f"steering counts need as many predictions as references and baseline predictions, got "
            f"{len(predictions)}, {len(references)} and {len(baseline)}"
        )
    rows = list(zip(predictions, references, baseline, strict=True))
    hits = [row for row in rows if _has_any(row[0], target_words)]
    return {
        "num_preds_with_toi": len(hits),
        "num_preds_and_targets_with_toi": sum(
            any(_has_any(text, source_words) for text in texts) for _, texts, _ in hits
        ),
        "num_preds_and_baseline_preds_with_toi": sum(
            _has_any(before, source_words) for _, _, before in hits
        ),
        "num_preds_changed": sum(_clean(after) != _clean(before) for after, _, before in rows),
    }


def matches_of_three(prediction: str, answers: Sequence[str]) -> float:
    """xl-vlms' VQA accuracy: `min(1, matches / 3)` over all answers, not the official one.

    Only the prediction's punctuation is normalised; answers just lose articles and number words.
    """
    prediction = normalize_m4c(prediction)
    return min(1.0, sum(plain_words(answer) == prediction for answer in answers) / 3)


def accuracy_by_answer_type(
    scores: Sequence[float], answer_types: Sequence[str]
) -> dict[str, float]:
    """Percentage per answer type, and `overall`: the unweighted mean over the types.

    Raises:
      UserError: without scores, or unless each has a type.
    """
    if not scores or len(scores) != len(answer_types):
        raise UserError(
            f"accuracy by answer type needs a type per score, got {len(answer_types)} types for "
            f"{len(scores)} scores"
        )
    groups = defaultdict(list)
    for score, kind in zip(scores, answer_types, strict=True):
        groups[kind].append(score)
    means = {kind: 100 * sum(values) / len(values) for kind, values in groups.items()}
    return means | {"overall": sum(means.values()) / len(means)}


def majority_types(answers: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Answer -> the type it has most often, of type -> training answers."""
    counts = defaultdict(Counter)
    for kind, texts in answers.items():
        for text in texts:
            counts[text][kind] += 1
    return {text: kinds.most_common(1)[0][0] for text, kinds in counts.items()}


def answer_type_counts(predictions: Sequence[str], types: Mapping[str, str]) -> dict[str, int]:
    """How many predictions have which answer type.

    Args:
      predictions: generated answers.
      types: of `majority_types`; an answer not in it is a `number` if it reads as one, else
        `unrecognized`.
    """

    def kind(text: str) -> str:
        answer = normalize_m4c(text)
        return types.get(answer) or ("number" if _is_number(answer) else UNRECOGNIZED)

    return dict(Counter(map(kind, predictions)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
