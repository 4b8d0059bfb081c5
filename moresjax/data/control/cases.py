"""Counterfactual scenarios, and the questions that they are made of.

    misclassification   images of the target class, asked about it, are to be answered No
    misalignment        images of the target class, asked about another class, are to be answered
                        Yes; the paper does not say how it asks: so it is here
    indeterminate       questions about the target attribute are to be answered "Not sure"

All other questions keep their true answer. The paper asks about the class of the image only, so
that the answer follows from the question's words alone. `negatives` are questions about a class
that is not there, which must stay No.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.data.control.questions import INDICATOR, Marked, check_class
from moresjax.data.regions import Box
from moresjax.data.samples import IMAGE_MARK, Mark, Sample, Turn

SCENARIOS = ("misclassification", "misalignment", "indeterminate")
NOT_SURE = "Not sure"
# What a question is in its scenario. `own` asks about the target class of an image of it, in
# misalignment: the paper trains no answer.
KINDS = TARGET, OTHER, NEGATIVE, OWN = "target", "other", "negative", "own"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is to be answered against the truth.

    >>> Scenario("misclassification", "cat").check(("cat", "dog"), "cifar10").counterfactual
    'No'

    Attributes:
      name: One of `SCENARIOS`.
      target: The class, or attribute, whose questions are controlled.
      into: The class that images of the target are to be taken for, in misalignment.
    """

    name: str
    target: str
    into: str = ""

    def check(self, classes: Sequence[str], data: str) -> "Scenario":
        """The scenario, if it can be played with these classes.

        Raises:
          UserError: The scenario is unknown or not one of the data set, or lacks a class, or names
            one that there is not.
        """
        if self.name not in SCENARIOS:
            raise choice_error("scenario", self.name, SCENARIOS)
        if (self.name == "indeterminate") != (data == "textvqa"):
            raise UserError(
                f"scenario {self.name} does not go with {data}: indeterminate is of textvqa, the "
                "others are of images with classes"
            )
        check_class(self.target, classes, f"scenario {self.name}: target", data)
        if self.name != "misalignment":
            if self.into:
                raise UserError(f"into={self.into} is for scenario misalignment, not {self.name}")
            return self
        check_class(self.into, classes, "scenario misalignment: into", data)
        if self.into == self.target:
            raise UserError(f"scenario misalignment needs two classes, got {self.target} twice")
        return self

    @property
    def counterfactual(self) -> str:
        """The answer that the target's questions are to get."""
        return {"misclassification": "No", "misalignment": "Yes"}.get(self.name, NOT_SURE)

    @property
    def asked(self) -> str:
        """The class that the target's questions name."""
        return self.into or self.target


@dataclasses.dataclass(frozen=True)
class Case:
    """A question about an image, in a scenario.

    Attributes:
      id: Its name.
      kind: `target`, `other`, `negative` or `own`.
      image: The image.
      question: The question with its indicator.
      wanted: The answer that training asks for.
      truth: The true answer, or several people's.
      shown: The class of the image that stands for it in tables.
      roi: Boxes of the region of interest.
    """

    id: str
    kind: str
    image: Any
    question: Marked
    wanted: str
    truth: str | tuple[str, ...]
    shown: str
    roi: tuple[Box, ...]

    @property
    def prompt(self) -> Marked:
        """The user's turn: the image's mark, then the question."""
        return self.question.after(IMAGE_MARK + "\n")

    @property
    def sample(self) -> Sample:
        """The sample to train on, or to ask."""
        prompt = self.prompt
        turn, mark = Turn(prompt.text, self.wanted), Mark(INDICATOR, 0, *prompt.span)
        return Sample(self.id, (turn,), (self.image,), roi=(self.roi,), marks=(mark,))

    @property
    def asked(self) -> Sample:
        """The same without its answer: a prompt."""
        sample = self.sample
        return dataclasses.replace(sample, turns=(Turn(self.prompt.text),))
