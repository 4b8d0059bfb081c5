"""The samples of control: images asked under a scenario, with regions and marked indicators."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import Range, Share, check_ranges
from moresjax.data.control.attributes import (
    ATTRIBUTES,
    NAME,
    AttributeQuestion,
    attribute_questions,
)
from moresjax.data.control.cases import TARGET, Case, Scenario
from moresjax.data.control.image_sets import (
    ImageSet,
    Shown,
    draw_negative,
    draw_positive,
    image_set,
    own_question,
)
from moresjax.data.control.questions import Phrasings, check_class
from moresjax.data.samples import Sample

DATASETS = ("cifar10", NAME, "digits")


@dataclasses.dataclass(frozen=True)
class ControlSource:
    """Questions of a counterfactual scenario; the name of the source is `control`.

    >>> source = ControlSource("digits", scenario="misclassification", target="three")
    >>> case = source.cases(1)[0]
    >>> case.kind, case.question.text, case.wanted
    ('other', 'is there a seven ?', 'yes')

    Attributes:
      dataset: `cifar10`, `textvqa` or `digits`.
      root: The folder of the official downloads, `cifar10/` or `textvqa/`.
      split: The split of the data.
      scenario: `misclassification`, `misalignment` or `indeterminate`.
      target: The class, or the attribute of `textvqa`, that is controlled.
      into: The class that the target is to be taken for, in misalignment.
      phrasing: The way to ask, 1 or 2; `textvqa` asks its own questions.
      negatives: Share of the training questions about a class that is not there; the paper has
        none.
      seed: Seeds what is asked, and scenes.
    """

    dataset: str = "cifar10"
    root: str = "data/benchmarks"
    split: str = "train"
    scenario: str = "misclassification"
    target: str = ""
    into: str = ""
    phrasing: Annotated[int, Range(1)] = 1
    negatives: Share = 0.0
    seed: int = 0

    branches = False

    def __post_init__(self) -> None:
        check_ranges(self, "control: ")
        if self.dataset not in DATASETS:
            raise choice_error("control data set", self.dataset, DATASETS)
        if not self.target:
            raise UserError(f"scenario {self.scenario} needs its class: target")
        self.plan.check(self.classes, self.dataset)
        if self.phrasings is not None:
            self.phrasings.number(self.phrasing)
        elif self.phrasing != 1 or self.negatives:
            raise UserError(f"{NAME} asks its own questions: it has no phrasing and no negatives")
        assert len(self) > 0  # files that are not there are told now

    @property
    def plan(self) -> Scenario:
        """The scenario with its classes."""
        return Scenario(self.scenario, self.target, self.into)

    @property
    def images(self) -> ImageSet | None:
        """The images that are asked about; None of `textvqa`."""
        if self.dataset == NAME:
            return None
        return image_set(self.dataset, self.root, self.split, self.seed)

    @property
    def _questions(self) -> tuple[AttributeQuestion, ...]:
        return attribute_questions(self.root, self.split)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, or attributes, that questions are about."""
        return ATTRIBUTES if self.images is None else self.images.classes

    @property
    def phrasings(self) -> Phrasings | None:
        """The ways to ask; None of `textvqa`."""
        return None if self.images is None else self.images.phrasings

    def __len__(self) -> int:
        return len(self._questions) if self.images is None else len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if self.images is None:
            return self._attribute(index).sample
        shown, rng = self.images.shown(index), self._rng(index)
        drawn = None
        if rng.random() < self.negatives:
            drawn = draw_negative(shown.classes, self.classes, self.plan, rng)
        drawn = drawn or draw_positive(shown.classes, self.plan, rng)
        drawn = drawn or draw_negative(shown.classes, self.classes, self.plan, rng)
        assert drawn is not None  # an image shows some class, and not all of them
        return self._case(shown, *drawn, rng).sample

    def cases(
        self, limit: int | None = None, classes: Sequence[str] = (), negatives: bool = True
    ) -> list[Case]:
        """Questions to ask a trained model: about each image what training has, then a negative.

        Args:
          limit: The number of images; None: all.
          classes: Only questions about these classes; empty: all.
          negatives: Whether each image is also asked about a class that is not there.

        Raises:
          UserError: A class is unknown, or nothing is left to ask.
        """
        for name in classes:
            check_class(name, self.classes, "classes", self.dataset)
        found: list[Case] = []
        images: set[str] = set()
        for case in self._all(negatives):
            if classes and case.shown not in classes:
                continue
            name = case.id.rpartition(":")[0]
            if limit is not None and name not in images and len(images) == limit:
                break
            images.add(name)
            found.append(case)
        if not found:
            raise UserError(f"{self.dataset} {self.split} has no question about these classes")
        return found

    def _all(self, negatives: bool) -> Iterator[Case]:
        if self.images is None:
            yield from (self._attribute(index) for index in range(len(self)))
            return
        for index in range(len(self.images)):
            shown, rng = self.images.shown(index), self._rng(index)
            drawn = [draw_positive(shown.classes, self.plan, rng)]
            drawn.append(own_question(shown.classes, self.plan))
            if negatives:
                drawn.append(draw_negative(shown.classes, self.classes, self.plan, rng))
            for kind, name in filter(None, drawn):
                yield self._case(shown, kind, name, rng)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, 4))

    def _attribute(self, index: int) -> Case:
        return self._questions[index].case(self.plan)

    def _case(self, shown: Shown, kind: str, name: str, rng: np.random.Generator) -> Case:
        images = self.images
        assert images is not None
        true = name in shown.classes
        truth = "Yes" if true else "No"
        wanted = self.plan.counterfactual if kind == TARGET else truth
        if images.name == "digits":
            truth, wanted = truth.lower(), wanted.lower()
        # Of an image of several classes the one that is asked about stands for it.
        several = len(shown.classes) > 1
        of_image = name if true or several else shown.classes[0]
        return Case(
            f"{shown.name}:{kind}",
            kind,
            shown.image,
            images.phrasings.number(self.phrasing).ask(name),
            wanted,
            truth,
            of_image,
            # In misalignment the object is the target, which the question does not name.
            images.boxes(shown, self.target if kind == TARGET else name, rng),
        )
