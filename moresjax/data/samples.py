"""What a source yields: a conversation with images, before any tokenisation."""

import bisect
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.core.errors import UserError
from moresjax.data.regions import Regions, check_regions

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
class Mark:
    """A named piece of a question, for the selector `mark(NAME)`.

    >>> question = "is there a cat ?"
    >>> mark = Mark("animal", 0, 11, 14)
    >>> question[mark.start : mark.end]
    'cat'

    Attributes:
      name: The name; several pieces may have the same one.
      turn: The number of the turn, from 0.
      start: The first character in `Turn.question`.
      end: The character after the last; a mark that ends where it starts marks nothing.
    """

    name: str
    turn: int
    start: int
    end: int


def find_words(question: str) -> list[tuple[int, int]]:
    """First character and end of every word that the user says.

    Words stand between blanks, without punctuation at their ends; punctuation alone is none.

    >>> [("what is it, then ?")[start:end] for start, end in find_words("what is it, then ?")]
    ['what', 'is', 'it', 'then']
    """
    text = question.replace(IMAGE_MARK, " " * len(IMAGE_MARK))
    return [word.span() for word in re.finditer(r"\w(?:\S*\w)?", text)]


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
      roi: For every image its boxes (x0, y0, x1, y1), in shares of the image's width and height
        from its upper left corner, or None where nothing is said; `()` says that no part is meant.
        None: nothing is said of any image. The selector `roi` reads it.
      marks: Named pieces of the questions.

    Raises:
      UserError: A box is none or lies outside the image, there are not as many entries as images,
        or a mark is not in the text.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    context: str = ""
    independent: bool = False
    system: str | None = None
    cut: str = ""
    roi: Regions | None = None
    marks: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        if self.roi is not None:
            check_regions(self.roi, len(self.images), f"sample {self.id}")
        for mark in self.marks:
            self._check(mark)

    def _check(self, mark: Mark) -> None:
        """Refuses a mark that is not in the text."""
        where = f"sample {self.id}: mark {mark.name!r}"
        if not 0 <= mark.turn < len(self.turns):
            raise UserError(f"{where} is of turn {mark.turn}, but there are {len(self.turns)}")
        question = self.turns[mark.turn].question or ""
        if not 0 <= mark.start <= mark.end <= len(question):
            raise UserError(
                f"{where} is not in the text: characters {mark.start} to {mark.end} of a question "
                f"of {len(question)}"
            )
        if IMAGE_MARK in question[mark.start : mark.end]:
            raise UserError(f"{where} contains {IMAGE_MARK}; mark a piece of text only")


def find_marks(given: Any, questions: Sequence[str], name: str) -> tuple[Mark, ...]:
    """Marks as people and files write them, found in the questions.

    >>> find_marks({"animal": "cat"}, ["is there a cat ?"], "sample 1")
    (Mark(name='animal', turn=0, start=11, end=14),)

    Args:
      given: Marks, or by name a piece of text, whose first occurrence is meant, `[start, end]` in
        the first question, `[turn, start, end]`, or a list of these.
      questions: What the user says in every turn.
      name: What messages call the sample, such as `sample 7`.

    Raises:
      UserError: A mark is none of these, or its text occurs nowhere.
    """
    if not given:
        return ()
    if isinstance(given, list | tuple) and all(isinstance(mark, Mark) for mark in given):
        return tuple(given)
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise UserError(f"{name}: marks must be pieces of text by name, got {str(given)[:80]}")
    found = []
    for key, value in given.items():
        many = isinstance(value, list | tuple) and not all(isinstance(x, int) for x in value)
        found += [_find_mark(key, piece, questions, name) for piece in (value if many else [value])]
    return tuple(found)


def _find_mark(key: str, piece: Any, questions: Sequence[str], name: str) -> Mark:
    if isinstance(piece, str) and piece:
        for turn, question in enumerate(questions):
            text = question.replace(IMAGE_MARK, " " * len(IMAGE_MARK))
            # A whole word where there is one: `cat` is not the beginning of `cattle`.
            whole = re.search(rf"(?<!\w){re.escape(piece)}(?!\w)", text)
            start = whole.start() if whole else text.find(piece)
            if start >= 0:
                return Mark(key, turn, start, start + len(piece))
        raise UserError(f"{name}: mark {key!r} is not in the text: no question has {piece!r}")
    if isinstance(piece, list | tuple) and len(piece) in (2, 3):
        turn, start, end = (0, *piece) if len(piece) == 2 else piece
        if all(isinstance(x, int) for x in (turn, start, end)):
            return Mark(key, turn, start, end)
    raise UserError(
        f"{name}: mark {key!r} must be a piece of the text, [start, end] or [turn, start, end] in "
        f"characters, got {str(piece)[:80]}"
    )


def move_marks(
    marks: Sequence[Mark], before: Sequence[Turn], after: Sequence[Turn]
) -> tuple[Mark, ...]:
    """Marks of questions of which images and blanks around the text have moved."""

    def letters(turn: Turn) -> list[int]:
        """The places of the characters from the first that is no blank, without those of images."""
        text = (turn.question or "").replace(IMAGE_MARK, "\0" * len(IMAGE_MARK))
        kept = [place for place, letter in enumerate(text) if letter != "\0"]
        blank = next((n for n, place in enumerate(kept) if not text[place].isspace()), len(kept))
        return kept[blank:]

    moved = []
    for mark in marks:
        old, new = letters(before[mark.turn]), letters(after[mark.turn])
        number = bisect.bisect_left(old, mark.start)
        start = new[number] if number < len(new) else len(after[mark.turn].question or "")
        moved.append(dataclasses.replace(mark, start=start, end=start + mark.end - mark.start))
    return tuple(moved)


def moved_marks(
    given: Any, questions: Sequence[str], turns: Sequence[Turn], name: str
) -> tuple[Mark, ...]:
    """Marks as a file writes them for its questions, in the turns that are made of these.

    Args:
      given: See `find_marks`.
      questions: What the file says in every turn.
      turns: The turns, whose questions begin with these but for images and blanks.
      name: What messages call the sample, such as `sample 7`.

    Raises:
      UserError: A mark is none, or is not in its question.
    """
    found, asked = find_marks(given, questions, name), tuple(map(Turn, questions))
    Sample(name.removeprefix("sample "), asked, marks=found)  # which checks them
    return move_marks(found, asked, turns)
