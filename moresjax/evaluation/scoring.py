"""From predictions to a score: the pattern each benchmark picks and fills with its metric.

A `Scorer` takes the items, one prediction per item (None where there is none) and a judge, and
returns a `Score`. A missing prediction is wrong; it never leaves the denominator.
"""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.captions import caption_summary, cider_d
from moresjax.evaluation.metrics.choices import mentioned_label
from moresjax.evaluation.metrics.judge_prompts import PROMPTS, fill, prompt_hash
from moresjax.evaluation.metrics.ptb import tokenize

Predictions = Sequence[str | None]
# (items, predictions, score of every item) -> further numbers, by name.
Details = Callable[[Sequence, Predictions, Sequence[float]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A benchmark's number, and what belongs beside it.

    Attributes:
      metric: what the number is.
      items: score of every item; empty when only a server or a judge could tell.
      details: further numbers of the benchmark's own tool, in its units.
      judge: who judged, with which prompt and settings; nothing for a plain metric.
      total: the number when it is not the mean of `items`.
      fraction: whether the number is a share of what is right, from 0 to 1.
      errors: by item id, why there is no judgement; the item counts as wrong.
    """

    metric: str
    items: Sequence[float] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    total: float | None = None
    fraction: bool = True
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The number: the mean of `items` unless there is a `total`; None when it is unknown."""
        if self.total is not None or not self.items:
            return self.total
        return statistics.fmean(self.items)

    @property
    def stderr(self) -> float | None:
        """Standard error of a mean over items; None for other numbers."""
        if self.total is not None or not self.items:
            return None
        spread = statistics.stdev(self.items) if len(self.items) > 1 else 0.0
        return spread / math.sqrt(len(self.items))


Scorer = Callable[..., Score]  # (items, predictions, judge=None)


def percent_by(*fields: str) -> Details:
    """Details: mean score in percent of the items that share a value of these facts."""

    def details(items: Sequence, predictions: Predictions, values: Sequence[float]) -> dict:
        groups = defaultdict(list)
        for item, value in zip(items, values, strict=True):
            for field in fields:
                groups[item.facts[field]].append(value)
        return {group: 100 * statistics.fmean(found) for group, found in groups.items()}

    return details


def exact_match(prediction: str, answer: str) -> float:
    """1 for the same text up to case and surrounding blanks."""
    return float(prediction.strip().lower() == answer.strip().lower())


def by_item(
    metric: Callable[[str, Any], float] = exact_match,
    details: Details | None = None,
    name: str = "accuracy",
) -> Scorer:
    """Mean over items of `metric(prediction, answer)`.

    Items whose answer only a server knows leave the score open.
    """

    def score(items: Sequence, predictions: Predictions, judge: Judge | None = None) -> Score:
        if any(item.answer is None for item in items):
            return Score(name)
        values = [
            0.0 if text is None else float(metric(text, item.answer))
            for item, text in zip(items, predictions, strict=True)
        ]
        return Score(name, values, details(items, predictions, values) if details else {})

    return score


def captions(items: Sequence, predictions: Predictions, judge: Judge | None = None) -> Score:
    """CIDEr-D over the items' reference captions; BLEU and ROUGE-L beside it."""
    if any(item.answer is None for item in items):
        return Score("CIDEr", fraction=False)
    texts = [text or "" for text in predictions]
    references = [item.answer for item in items]
    tokens = [[tokenize(caption) for caption in captions] for captions in references]
    values = cider_d([tokenize(text) for text in texts], tokens)
    return Score("CIDEr", values, caption_summary(texts, references), fraction=False)


def judged(
    prompt: str,
    parse: Callable[[str], float | None],
    *,
    rule: Callable[[str, Any], float] | None = None,
    fields: Callable[[Any], Mapping[str, str]] = lambda item: {},
    values: Callable[[Sequence, Sequence[float]], Sequence[float]] = lambda items, marks: marks,
    details: Details | None = None,
    name: str = "accuracy",
    attempts: int = 1,
    retry: str = "",
) -> Scorer:
    """Mean over items of a judge's marks.

    Args:
      prompt: name of the judge's prompt.
      parse: the judge's reply to a mark; None asks again.
      rule: (prediction, answer) to a mark when there is no judge; without it there is no score.
      fields: fields of the prompt for an item, beside question, answer and prediction.
      values: (items, marks) to scores in 0..1.
      details: gets the marks as its third argument.
      name: of the metric.
      attempts: how often a reply that cannot be read is asked for; then the mark is 0.
      retry: added to the prompt from the second attempt on.
    """
    template = PROMPTS[prompt]

    def ask(item, text: str, judge: Judge) -> float:
        question = item.prompt.replace(IMAGE_MARK, "").strip()
        given = {"question": question, "answer": str(item.answer), "prediction": text}
        asked = fill(template, **given | dict(fields(item)))
        for attempt in range(attempts):
            found = parse(judge(asked + (retry if attempt else ""), attempt))
            if found is not None:
                return float(found)
        return 0.0

    def score(items: Sequence, predictions: Predictions, judge: Judge | None = None) -> Score:
        if judge is None and rule is None:
            return Score(name, judge={"name": "none"})
        if judge is None:
            who = {"name": "rule", "comparable": False}
        else:
            settings = dict(judge.settings)
            who = {"name": judge.name, "prompt_hash": prompt_hash(template), "settings": settings}

        def mark(item, text: str | None) -> tuple[float, str]:
            if text is None:
                return 0.0, ""
            if judge is None:
                return float(rule(text, item.answer)), ""
            try:
                return ask(item, text, judge), ""
            except Exception as error:  # a judge is any callable
                return 0.0, f"no judgement: {error}"

        found = _each(mark, items, predictions, getattr(judge, "parallel", 1))
        marks = [value for value, _ in found]
        errors = {item.id: error for item, (_, error) in zip(items, found, strict=True) if error}
        if errors and len(errors) == sum(text is not None for text in predictions):
            return Score(name, judge=who, errors=errors)
        more = details(items, predictions, marks) if details else {}
        return Score(name, values(items, marks), more, who, errors=errors)

    return score


def _each(function: Callable, items: Sequence, predictions: Predictions, parallel: int) -> list:
    """Results in order, of several calls at a time."""
    if parallel == 1:
        return [function(*pair) for pair in zip(items, predictions, strict=True)]
    pool = ThreadPoolExecutor(parallel)
    try:
        return list(pool.map(function, items, predictions))
    finally:  # also when interrupted
        pool.shutdown(cancel_futures=True)


def same_answer(rule: Callable[[str, Any], float]) -> Scorer:
    """MRT's protocol: the share of answers of which a judge says that they are right."""
    return judged("mrt", lambda reply: float(reply.strip().lower().startswith("yes")), rule=rule)


def one_label(labels: Sequence[str]) -> Scorer:
    """`same_answer` for a classification; without a judge, an answer must name its label alone."""
    return same_answer(lambda text, answer: float(mentioned_label(text, labels) == answer))
