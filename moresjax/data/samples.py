"""What a source yields: a conversation with images, before any tokenisation."""

import dataclasses
from typing import Any

IMAGE_MARK = "<image>"
# What may be left out of a conversation.
EARLY_TURNS, LATER_TURNS = "turns before the first question", "turns after the first"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
      question: What the user says. None stands for text that goes on from the context without role
        markers: captions and plain text.
      answer: What the model says; None for a prompt, whose answer is to be generated.
    """

    question: str | None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation.

    >>> turn = Turn("<image> What is in the picture?", "A cat on a sofa.")
    >>> sample = Sample("photo-1", (turn,), images=("photo.jpg",))
    >>> sample.turns[0].answer
    'A cat on a sofa.'

    Attributes:
      id: The name used in error messages and predictions.
      turns: The rounds of the conversation.
      images: One entry per `<image>` in the text: a path, the bytes of a file, a PIL image or a
        uint8 array `[Y, X, 3]`.
      context: The text before the first question, shared by all turns; may contain `<image>`.
      independent: Whether the turns are separate questions about one context, none of which sees
        another (they become branches of the layout), instead of rounds of one conversation. Where
        the context ends with an image, each has the tokens that it has alone.
      system: The conversation's own system prompt; None for the template's.
      cut: What its source left out of it, in a sentence; empty for nothing.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    context: str = ""
    independent: bool = False
    system: str | None = None
    cut: str = ""
