"""Steering from some answers to others (`answers:yes>no`) and to a type (`answer_type:number`)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.answer_types import answer_type, type_counts, type_map
from moresjax.evaluation.metrics.vqa import normalize_vqa
from moresjax.evaluation.steering.tasks import SteeringTask, steering_task


class AnswerTask(SteeringTask):
    """From given answers to given answers; case, articles and number words do not count.

    Args:
      source: The answers to steer away from.
      target: The answers to steer to.

    Raises:
      UserError: A side has no answers, or both have one.
    """

    def __init__(self, source: Sequence[str], target: Sequence[str]) -> None:
        self.source, self.target = ({*map(normalize_vqa, x)} - {""} for x in (source, target))
        if not self.source or not self.target:
            raise UserError("steering needs answers to steer from and to, such as answers:yes>no")
        if both := sorted(self.source & self.target):
            raise UserError(f"the answer {both[0]!r} is the source's and the target's")
        self.name = f"{'+'.join(sorted(self.source))}>{'+'.join(sorted(self.target))}"
        self._typed: list[tuple[str, str]] = []
        self._types: dict[str, str] = {}

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps true answers with the types of their questions, where the states tell them."""
        self._typed = _typed(rows)

    def learn_types(self, examples: Sequence[Example]) -> None:
        """Counts types by the true answers of these questions and no others."""
        self._types = type_map(_typed_questions(examples))

    def is_source(self, answer: str) -> bool:
        """Whether it is one of the source's answers."""
        return normalize_vqa(answer) in self.source

    def is_target(self, answer: str) -> bool:
        """Whether it is one of the target's answers."""
        return normalize_vqa(answer) in self.target

    def metrics(
        self, examples: Sequence[Example], baseline: Sequence[str], steered: Sequence[str]
    ) -> dict[str, Any]:
        """Counts of the answers that steering changed most, and of types, before and after.

        Types come from the answers that `learn_types` was shown. Else they come from the true
        answers behind the states and of these questions: states are of chosen questions, whose
        answers are few.
        """
        before, after = (Counter(map(normalize_vqa, x)) for x in (baseline, steered))
        ranked = sorted({**before, **after}, key=lambda x: (-abs(after[x] - before[x]), x))
        found: dict[str, Any] = {"answers": {x: [before[x], after[x]] for x in ranked[:20]}}
        own = [*self._typed, *_typed_questions(examples)]
        if types := self._types or type_map(own):
            found["answer_types"] = _both_counts(baseline, steered, types)
        return found


class AnyTask(SteeringTask):
    """From no answer in particular: what fine vectors lead to is in their selection."""

    name = "fine"

    def is_source(self, answer: str) -> bool:
        """No answer is the source's, so that all count as others."""
        return False

    def is_target(self, answer: str) -> bool:
        """No answer is the target's."""
        return False


class AnswerTypeTask(SteeringTask):
    """From all other types of answers to one type, as the questions of the states have them.

    Args:
      wanted: The type, such as `number`: a value of `answer_type` in the states' metadata.
    """

    def __init__(self, wanted: str) -> None:
        self.name, self.wanted = f"answer_type:{wanted}", wanted
        self.types: dict[str, str] = {}

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Makes the map from answers to types of the questions' true answers.

        Raises:
          UserError: No row has a type, or none has the wanted one.
        """
        self.types = type_map(_typed(rows))
        if self.wanted not in self.types.values():
            raise choice_error("answer type", self.wanted, sorted({*self.types.values()}))

    def learn_types(self, examples: Sequence[Example]) -> None:
        """Makes the map of the true answers of these questions."""
        self.types = type_map(_typed_questions(examples))

    def is_target(self, answer: str) -> bool:
        """Whether the answer has the wanted type."""
        return answer_type(answer, self.types) == self.wanted

    def source_state(self, row: Mapping[str, Any]) -> bool:
        """Whether the question of a state wants another type."""
        kind = (row.get("metadata") or {}).get("answer_type")
        return kind is not None and kind != self.wanted

    def target_state(self, row: Mapping[str, Any]) -> bool:
        """Whether the question of a state wants this type."""
        return (row.get("metadata") or {}).get("answer_type") == self.wanted

    def metrics(
        self, examples: Sequence[Example], baseline: Sequence[str], steered: Sequence[str]
    ) -> dict[str, Any]:
        """Counts of types, before and after."""
        return {"answer_types": _both_counts(baseline, steered, self.types)}


def _typed(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """True answers with the type of their question, of rows that have both."""
    return [
        (answer, kind)
        for row in rows
        if (kind := (row.get("metadata") or {}).get("answer_type"))
        for answer in _texts(row.get("answers"))
    ]


def _typed_questions(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """True answers with the type of their question, of questions that have both."""
    return _typed([{"answers": e.answer, "metadata": e.metadata} for e in examples])


def _both_counts(
    baseline: Sequence[str], steered: Sequence[str], types: Mapping[str, str]
) -> dict[str, list[int]]:
    """How many answers have each type, before and after."""
    before, after = (type_counts(answers, types) for answers in (baseline, steered))
    return {kind: [before[kind], after[kind]] for kind in before}


def _texts(answers: Any) -> list[str]:
    """The answers of a row, which are one text or several."""
    if answers is None:
        return []
    return [answers] if isinstance(answers, str) else [str(answer) for answer in answers]


@steering_task("answers")
def answers(argument: str) -> SteeringTask:
    """`answers:yes>no`; several answers of a side stand between semicolons."""
    source, arrow, target = argument.partition(">")
    if not arrow:
        raise UserError(f"the steering task answers takes SOURCE>TARGET, got {argument!r}")
    return AnswerTask(source.split(";"), target.split(";"))


@steering_task("answer_type")
def answer_types(argument: str) -> SteeringTask:
    """`answer_type:number`."""
    if not argument:
        raise UserError("the steering task answer_type takes a type, as in answer_type:number")
    return AnswerTypeTask(argument)
