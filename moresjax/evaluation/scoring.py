"""From predictions to a score: the patterns that benchmarks pick and fill with their metric.

A `Scorer` takes the examples, one prediction per example (None where there is none) and a judge,
and returns a `TaskScore`. A missing prediction is wrong; it never leaves the denominator.
"""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Example
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.captions import caption_summary, cider_d
from moresjax.evaluation.metrics.choices import mentioned_label
from moresjax.evaluation.metrics.judge_prompts import PROMPTS, fill, prompt_hash
from moresjax.evaluation.metrics.ptb import tokenize

Predictions = Sequence[str | None]
# (examples, predictions, score or grade of every example) -> further numbers, by name.
Details = Callable[[Sequence[Example], Predictions, Sequence[float]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """A task's number, and what belongs beside it.

    >>> score = TaskScore("accuracy", [1.0, 0.0, 1.0, 1.0])
    >>> score.value
    0.75

    Attributes:
      metric: What the number is, such as `accuracy`.
      per_example: The score of every example; empty when only a server or a judge could tell.
      details: Further numbers of the benchmark's own tool, in its units.
      judge: Who judged, with which prompt and settings; empty for a plain metric.
      total: The number where it is not the mean of `per_example`.
      fraction: Whether the number is a share of what is right, from 0 to 1.
      errors: By example id, why there is no judgement; the example counts as wrong.
    """

    metric: str
    per_example: Sequence[float] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    total: float | None = None
    fraction: bool = True
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The total, else the mean of `per_example`; None when it is unknown."""
        if self.total is not None or not self.per_example:
            return self.total
        return statistics.fmean(self.per_example)


@runtime_checkable
class Scorer(Protocol):
    """Turns the predictions of a task into its score."""

    def __call__(
        self, examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
    ) -> TaskScore:
        """The score of one prediction per example; None stands for a missing one."""
        ...


def percent_by(*fields: str) -> Details:
    """Details with the mean score, in percent, of the examples that share a metadata value.

    Args:
      fields: The metadata fields to group by, such as `answer_type`.
    """

    def details(
        examples: Sequence[Example], predictions: Predictions, scores: Sequence[float]
    ) -> dict[str, float]:
        groups = defaultdict(list)
        for example, score in zip(examples, scores, strict=True):
            for field in fields:
                groups[example.metadata[field]].append(score)
        return {group: 100 * statistics.fmean(found) for group, found in groups.items()}

    return details


def exact_match(prediction: str, answer: str) -> float:
    """1 for the same text up to case and surrounding blanks.

    >>> exact_match(" Seven ", "seven"), exact_match("seven .", "seven")
    (1.0, 0.0)
    """
    return float(prediction.strip().lower() == answer.strip().lower())


def example_scorer(
    metric: Callable[[str, Any], float] = exact_match,
    details: Details | None = None,
    name: str = "accuracy",
) -> Scorer:
    """A scorer that takes the mean over examples of `metric(prediction, answer)`.

    Examples whose answer only a server knows leave the score open.

    >>> from moresjax.evaluation.examples import Example
    >>> questions = [Example("1", "2 + 2?", "4"), Example("2", "2 + 3?", "5")]
    >>> example_scorer()(questions, ["4", None]).value
    0.5

    Args:
      metric: Scores one prediction against the example's answer.
      details: Further numbers, from the examples' scores.
      name: The metric's name in results.
    """

    def scorer(
        examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
    ) -> TaskScore:
        if any(example.answer is None for example in examples):
            return TaskScore(name)
        scores = [
            0.0 if text is None else float(metric(text, example.answer))
            for example, text in zip(examples, predictions, strict=True)
        ]
        return TaskScore(name, scores, details(examples, predictions, scores) if details else {})

    return scorer


def caption_scorer(
    examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
) -> TaskScore:
    """CIDEr-D over the examples' reference captions, with BLEU and ROUGE-L as details."""
    if any(example.answer is None for example in examples):
        return TaskScore("CIDEr", fraction=False)
    texts = [text or "" for text in predictions]
    references = [example.answer for example in examples]
    tokens = [[tokenize(caption) for caption in captions] for captions in references]
    scores = cider_d([tokenize(text) for text in texts], tokens)
    return TaskScore("CIDEr", scores, caption_summary(texts, references), fraction=False)


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeScorer:
    """A scorer that takes the mean over examples of a judge's grades.

    Attributes:
      prompt: The name of the judge's prompt in `PROMPTS`.
      parse: Reads the judge's reply as a grade; None asks again.
      rule: Grades (prediction, answer) where there is no judge; without it there is no score.
      fields: Fields of the prompt for an example, beside question, answer and prediction.
      to_scores: Turns (examples, grades) into scores in 0..1.
      details: Further numbers, from the examples' grades.
      name: The metric's name in results.
      attempts: How often a reply that cannot be read is asked for; then the grade is 0.
      retry: Text that is added to the prompt from the second attempt on.
    """

    prompt: str
    parse: Callable[[str], float | None]
    _: dataclasses.KW_ONLY
    rule: Callable[[str, Any], float] | None = None
    fields: Callable[[Example], Mapping[str, str]] = lambda example: {}
    to_scores: Callable[[Sequence[Example], Sequence[float]], Sequence[float]] = (
        lambda examples, grades: grades
    )
    details: Details | None = None
    name: str = "accuracy"
    attempts: int = 1
    retry: str = ""

    def __call__(
        self, examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
    ) -> TaskScore:
        """The score by a judge, else by the rule, else an open one."""
        template = PROMPTS[self.prompt]
        if judge is not None:
            settings = dict(judge.settings)
            who = {"name": judge.name, "prompt_hash": prompt_hash(template), "settings": settings}
        elif self.rule is not None:
            who = {"name": "rule", "comparable": False}
        else:
            return TaskScore(self.name, judge={"name": "none"})

        def grade(example: Example, text: str | None) -> tuple[float, str]:
            return self._grade(example, text, judge)

        graded = _map(grade, examples, predictions, getattr(judge, "parallel", 1))
        grades = [value for value, _ in graded]
        errors = {e.id: error for e, (_, error) in zip(examples, graded, strict=True) if error}
        if errors and len(errors) == sum(text is not None for text in predictions):
            return TaskScore(self.name, judge=who, errors=errors)
        more = self.details(examples, predictions, grades) if self.details else {}
        return TaskScore(self.name, self.to_scores(examples, grades), more, who, errors=errors)

    def _grade(self, example: Example, text: str | None, judge: Judge | None) -> tuple[float, str]:
        """The grade of a prediction, and why there is none."""
        if text is None:
            return 0.0, ""
        if judge is None:
            assert self.rule is not None
            return float(self.rule(text, example.answer)), ""
        try:
            return self._ask(example, text, judge), ""
        except Exception as error:  # a judge is any callable
            return 0.0, f"no judgement: {error}"

    def _ask(self, example: Example, text: str, judge: Judge) -> float:
        question = example.prompt.replace(IMAGE_MARK, "").strip()
        given = {"question": question, "answer": str(example.answer), "prediction": text}
        asked = fill(PROMPTS[self.prompt], **given | dict(self.fields(example)))
        for attempt in range(self.attempts):
            grade = self.parse(judge(asked + (self.retry if attempt else ""), attempt))
            if grade is not None:
                return float(grade)
        return 0.0


def _map(
    function: Callable[[Example, str | None], tuple[float, str]],
    examples: Sequence[Example],
    predictions: Predictions,
    parallel: int,
) -> list[tuple[float, str]]:
    """The results in order, of several calls at a time."""
    if parallel == 1:
        return [function(*pair) for pair in zip(examples, predictions, strict=True)]
    pool = ThreadPoolExecutor(parallel)
    try:
        return list(pool.map(function, examples, predictions))
    finally:  # also when interrupted
        pool.shutdown(cancel_futures=True)


def same_answer_scorer(rule: Callable[[str, Any], float]) -> Scorer:
    """MRT's protocol: the share of predictions of which a judge says that they are right.

    Args:
      rule: Grades (prediction, answer) where there is no judge.
    """

    def parse(reply: str) -> float:
        return float(reply.strip().lower().startswith("yes"))

    return JudgeScorer("mrt", parse, rule=rule)


def label_scorer(labels: Sequence[str]) -> Scorer:
    """`same_answer_scorer` for a classification; its rule wants the right label and no other."""
    return same_answer_scorer(lambda text, answer: float(mentioned_label(text, labels) == answer))
