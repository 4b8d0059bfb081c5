"""What a dataset yields: a conversation with images, before any tokenisation."""

import dataclasses
from typing import Any

IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer.

    The answer of a prompt, to be generated, is None. A question of None stands for text that goes
    on from the context without role markers: captions and plain text.
    """

    question: str | None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
      id: name used in error messages and predictions.
      turns: the rounds of the conversation.
      images: one entry per `<image>` in the text: a path, a PIL image or a `[Y, X, 3]` uint8 array.
      context: text before the first question, shared by all turns; may contain `<image>`.
      independent: the turns are separate questions about one context, none of which sees another
        (they become branches of the layout), instead of rounds of one conversation.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    context: str = ""
    independent: bool = False
