"""Rephrasers: they lead other ways to ask back to the phrasing that editors were trained on.

The paper tunes T5-small for it; a table of its six templates does the same exactly, and any text
LLM can be tuned on `rephrasing_pairs` (`moresjax.inference.rephraser`): nothing needs T5.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from moresjax.core.errors import choice_error
from moresjax.data.cifar import CIFAR10_CLASSES
from moresjax.data.control.questions import (
    DIGITS,
    OBJECTS,
    Marked,
    Phrasing,
    Phrasings,
    find_indicator,
)
from moresjax.data.digits import WORDS
from moresjax.data.samples import Sample, Turn

INSTRUCTION = "Rephrase: "
# By data set the ways to ask, and the classes that are asked about.
PHRASED = {"cifar10": (OBJECTS, CIFAR10_CLASSES), "digits": (DIGITS, WORDS)}


@runtime_checkable
class Rephraser(Protocol):
    """Anything that turns a question into another."""

    def __call__(self, text: str, /) -> str:
        """The rephrased question; the question itself where there is nothing to rephrase."""
        ...


@dataclasses.dataclass(frozen=True)
class TemplateRephraser:
    """Leads known paraphrases back to a phrasing, whatever class they are about.

    >>> from moresjax.data.control.questions import OBJECTS
    >>> rephraser = TemplateRephraser(OBJECTS.trained[0], OBJECTS.paraphrases)
    >>> rephraser("Do you recognize the object in the image as an airplane?")
    'Is the object an airplane in the image?'
    >>> rephraser("What is this?")
    'What is this?'

    Attributes:
      canonical: The phrasing of the answer.
      known: The phrasings that are understood.
    """

    canonical: Phrasing
    known: Sequence[Phrasing]

    def __call__(self, text: str, /) -> str:
        """The question in the canonical phrasing; unchanged where it is of no known phrasing."""
        for phrasing in (self.canonical, *self.known):
            if (name := phrasing.indicator(text)) is not None:
                return self.canonical.ask(name).text
        return text


def rephrase(rephraser: Rephraser, question: Marked) -> Marked | None:
    """A rephrased question with its indicator marked again.

    >>> rephrase(str.upper, Marked("is it a cat?", (8, 11)))
    Marked(text='IS IT A CAT?', span=(8, 11))

    Returns:
      None where the indicator is not in the new question, or several times.
    """
    return find_indicator(rephraser(question.text), question.indicator)


def rephrasing_pairs(
    phrasings: Phrasings, classes: Sequence[str], number: int = 1
) -> Iterator[tuple[str, str]]:
    """Every known way to ask about every class, and the phrasing that it is to become.

    >>> from moresjax.data.control.questions import DIGITS
    >>> next(rephrasing_pairs(DIGITS, ["three"]))
    ('is there a three ?', 'is there a three ?')

    Args:
      phrasings: The ways to ask.
      classes: What is asked about.
      number: The trained phrasing to rephrase to.
    """
    canonical = phrasings.number(number)
    for phrasing in dict.fromkeys((*phrasings.trained, *phrasings.paraphrases)):
        for name in classes:
            yield phrasing.ask(name).text, canonical.ask(name).text


@dataclasses.dataclass(frozen=True)
class RephrasingSource:
    """Conversations without images that teach a text LLM to rephrase; the source `rephrasing`.

    >>> source = RephrasingSource("digits", classes=("three",))
    >>> source[1].turns[0]
    Turn(question='Rephrase: is a three there ?', answer='is there a three ?')

    Attributes:
      dataset: The data set whose phrasings are learned, `cifar10` or `digits`.
      classes: What is asked about; empty: all classes of the data set. Other words than those to be
        asked about later teach to copy the indicator.
      phrasing: The phrasing to rephrase to, 1 or 2.
    """

    dataset: str = "cifar10"
    classes: tuple[str, ...] = ()
    phrasing: int = 1

    def __post_init__(self) -> None:
        if self.dataset not in PHRASED:
            raise choice_error("data set with phrasings", self.dataset, PHRASED)

    @functools.cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Questions, and what each becomes."""
        phrasings, classes = PHRASED[self.dataset]
        return list(rephrasing_pairs(phrasings, self.classes or classes, self.phrasing))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        asked, wanted = self.pairs[index]
        return Sample(f"rephrasing-{index}", (Turn(INSTRUCTION + asked, wanted),))
