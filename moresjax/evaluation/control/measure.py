"""Rates of control, and what editors do to questions that they should leave alone.

    control    share of the target's questions that are answered against the truth, as wanted
    error      1 - accuracy on other questions
    leakage    share of other questions that are right without editors and wrong with them

Every rate has a 95% interval over images, and every set of editors its paired difference from all
editors (cluster bootstrap over images).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.data.control.cases import NEGATIVE, OTHER, OWN, TARGET, Case, Scenario
from moresjax.evaluation.control.answers import ALL, BASE
from moresjax.evaluation.metrics.vqa import m4c_accuracy, normalize_vqa
from moresjax.evaluation.paired import bootstrap_interval
from moresjax.evaluation.statistics import clustered_stderr, interval


def says(text: str, answer: str) -> bool:
    """Whether a text begins with the words of an answer.

    >>> says("No, it is a dog.", "no"), says("Nothing", "no"), says("not sure.", "Not sure")
    (True, False, True)
    """
    words = normalize_vqa(answer).split()
    return normalize_vqa(text.replace(",", " ")).split()[: len(words)] == words


def correct(case: Case, text: str) -> float:
    """How true an answer is: 0 or 1, or the accuracy of TextVQA."""
    if isinstance(case.truth, str):
        return float(says(text, case.truth))
    return m4c_accuracy(text, case.truth)


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of questions.

    Attributes:
      mean: The share.
      n: The number of questions.
      interval95: Its 95% interval, clustered by image; None for fewer than two images.
    """

    mean: float
    n: int
    interval95: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float], images: Sequence[str]) -> "Rate | None":
        """The share of values of 0 to 1; None without values.

        >>> Rate.of([1.0, 0.0], ["a", "a"])
        Rate(mean=0.5, n=2, interval95=None)
        """
        if not values:
            return None
        mean, stderr = sum(values) / len(values), clustered_stderr(values, images)
        spread = None
        if stderr is not None:
            spread = interval(mean, stderr, len({*images}), share=True)
        return cls(mean, len(values), spread)

    def __str__(self) -> str:
        text = f"{100 * self.mean:.1f}%"
        if self.interval95 is None:
            return text
        low, high = (100 * x for x in self.interval95)
        return f"{text} [{low:.1f}, {high:.1f}]"


def image_of(case: Case) -> str:
    """The name of the image of a question."""
    return case.id.rpartition(":")[0] or case.id


@dataclasses.dataclass(frozen=True)
class Measured:
    """The answers of every set of editors, and what they say.

    Attributes:
      scenario: What was to be controlled.
      cases: The questions.
      answers: By set of editors the answers, in the order of the questions.
    """

    scenario: Scenario
    cases: Sequence[Case]
    answers: Mapping[str, Sequence[str]]

    def rates(self, editors: str, shown: str | None = None) -> dict[str, Rate | None]:
        """Control, and error and leakage by kind of question.

        Args:
          editors: The set of editors.
          shown: Only questions about images of this class.
        """
        found = {"control": self._rate(editors, TARGET, self._controlled, shown)}
        for kind in (OTHER, NEGATIVE, OWN):
            found[f"error {kind}"] = self._rate(editors, kind, self._wrong, shown)
            found[f"leakage {kind}"] = self._rate(editors, kind, self._leaked, shown)
        return found

    def differences(self, editors: str) -> dict[str, tuple[float, tuple[float, float] | None]]:
        """What a set of editors has more than all editors, with intervals paired by image."""
        return self._differences[editors]

    @functools.cached_property  # tables and files ask several times, and draw anew each time
    def _differences(self) -> dict[str, dict[str, tuple[float, tuple[float, float] | None]]]:
        return {editors: self._from_all(editors) for editors in self.answers}

    def _from_all(self, editors: str) -> dict[str, tuple[float, tuple[float, float] | None]]:
        found = {}
        for name, kind, value in (
            ("control", TARGET, self._controlled),
            (f"error {OTHER}", OTHER, self._wrong),
            (f"error {NEGATIVE}", NEGATIVE, self._wrong),
        ):
            own, images = self._values(editors, kind, value)
            every, _ = self._values(ALL, kind, value)
            if own:
                moved = [a - b for a, b in zip(own, every, strict=True)]
                found[name] = (sum(moved) / len(moved), bootstrap_interval(moved, images))
        return found

    def base_errors(self) -> dict[str, Rate]:
        """How often the model without editors is wrong about the class of an image, by class.

        It is the paper's misclassification of the base model; negatives are not among them.
        """
        found = {}
        for name in dict.fromkeys(case.shown for case in self.cases):
            own = [
                (self._wrong(BASE, number), image_of(case))
                for number, case in enumerate(self.cases)
                if case.shown == name and case.kind in self._about_own
            ]
            if own and (rate := Rate.of(*zip(*own, strict=True))):
                found[name] = rate
        return found

    @property
    def _about_own(self) -> tuple[str, ...]:
        """Kinds of questions that name what the image shows."""
        return (OTHER, OWN) if self.scenario.into else (OTHER, TARGET)

    def _rate(self, editors: str, kind: str, value: Any, shown: str | None) -> Rate | None:
        return Rate.of(*self._values(editors, kind, value, shown))

    def _values(
        self, editors: str, kind: str, value: Any, shown: str | None = None
    ) -> tuple[list[float], list[str]]:
        chosen = [
            (value(editors, number), image_of(case))
            for number, case in enumerate(self.cases)
            if case.kind == kind and shown in (None, case.shown)
        ]
        return [x for x, _ in chosen], [image for _, image in chosen]

    def _controlled(self, editors: str, number: int) -> float:
        return float(says(self.answers[editors][number], self.scenario.counterfactual))

    def _wrong(self, editors: str, number: int) -> float:
        return 1.0 - correct(self.cases[number], self.answers[editors][number])

    def _leaked(self, editors: str, number: int) -> float:
        lost = self._wrong(editors, number) - self._wrong(BASE, number)
        return max(lost, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """All rates as JSON takes them."""

        def plain(rates: Mapping[str, Rate | None]) -> dict[str, Any]:
            return {name: dataclasses.asdict(x) for name, x in rates.items() if x is not None}

        classes = dict.fromkeys(case.shown for case in self.cases)
        return {
            "rows": [
                {
                    "editors": name,
                    **plain(self.rates(name)),
                    "more_than_all_editors": {
                        what: {"mean": mean, "interval95": spread}
                        for what, (mean, spread) in self.differences(name).items()
                    },
                }
                for name in self.answers
            ],
            "base_errors": plain(self.base_errors()),
            "by_class": {name: plain(self.rates(ALL, name)) for name in classes},
        }
