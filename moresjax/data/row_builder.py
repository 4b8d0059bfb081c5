"""The parts of a row: texts between images, the pieces of them that are marked, and the row itself.

Axis legend: S tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.samples import IMAGE_MARK, Sample, find_words
from moresjax.data.templates import Piece
from moresjax.data.text_encoder import Text, Texts

# For every turn the marked pieces of its question: first character, end, and the bits.
Spans = dict[int, list[tuple[int, int, int]]]


def marked_spans(sample: Sample, names: Sequence[str]) -> Spans:
    """The pieces of a sample's questions that selectors mean.

    >>> from moresjax.data.samples import Turn
    >>> marked_spans(Sample("1", (Turn("is there a cat ?"),)), ("word(4)",))
    {0: [(11, 14, 1)]}

    Args:
      sample: The sample.
      names: `mark(NAME)` and `word(N)`; the n-th of them is bit n.

    Raises:
      UserError: The sample has no mark of that name, or a question fewer words.
    """
    spans: Spans = {}
    for bit, name in enumerate(names):
        kind, _, value = name.removesuffix(")").partition("(")
        if kind == "mark":
            found = [mark for mark in sample.marks if mark.name == value]
            if not found:
                raise UserError(
                    f"the tuning acts on mark({value}), but nothing is marked so; give marks "
                    f"{value!r}, with an end at its start for no text"
                )
            for mark in found:
                spans.setdefault(mark.turn, []).append((mark.start, mark.end, 1 << bit))
            continue
        for number, turn in enumerate(sample.turns):
            if turn.question is None:
                continue
            words = find_words(turn.question)
            if int(value) > len(words):
                text = " ".join(turn.question.replace(IMAGE_MARK, " ").split())
                text = text if len(text) < 80 else text[:76] + " ..."
                raise UserError(
                    f"the tuning acts on word {value} of a question, but {text!r} has {len(words)}"
                )
            spans.setdefault(number, []).append((*words[int(value) - 1], 1 << bit))
    return spans


def split_texts(
    pieces: Sequence[Piece], spans: Spans, *, answers_show_images: bool
) -> Iterator[tuple[int, Texts] | None]:
    """Runs of text without an image as (branch, texts), with None for every image between them.

    A chunk also ends where the branch changes, so that a question is tokenised the same whether it
    is asked alone or beside others.

    Args:
      pieces: The pieces of the conversation.
      spans: The marked pieces of its questions.
      answers_show_images: Whether `<image>` in an answer stands for an image.
    """
    branch, texts = 0, []
    for piece in pieces:
        whole = piece.kind == TokenKind.ANSWER and not answers_show_images
        marked = () if piece.turn is None else spans.get(piece.turn, ())
        start = piece.start  # of the text in its question
        for number, text in enumerate([piece.text] if whole else piece.text.split(IMAGE_MARK)):
            if texts and (number or branch != piece.branch):
                yield branch, tuple(texts)
                texts = []
            if number:
                yield None
            branch = piece.branch
            if text:
                own = ((a - start, b - start, bits) for a, b, bits in marked)
                inside = tuple(x for x in own if x[0] >= 0 and x[1] <= len(text))
                texts.append(Text(text, piece.kind, piece.control, inside))
            start += len(text) + len(IMAGE_MARK)
    if texts:
        yield branch, tuple(texts)


class RowBuilder:
    """Collects the tokens of a row; every branch goes on from the end of the trunk.

    Args:
      marked: Whether the row has marks.
    """

    def __init__(self, *, marked: bool = False) -> None:
        names = ("tokens", "kind", "image", "position", "branch", *(["marks"] if marked else []))
        self._fields = {name: [] for name in names}
        # The end of the trunk, and the branch and position of the next token.
        self._trunk = self._branch = self._position = 0

    def add(
        self,
        ids: Sequence[int],
        kinds: Sequence[int],
        *,
        branch: int,
        image: Sequence[int] | None = None,
        marks: Sequence[int] | None = None,
    ) -> None:
        """Appends tokens of one branch; `image` has the places of visual tokens."""
        if branch != self._branch:
            self._branch, self._position = branch, self._trunk
        end = self._position + len(ids)
        self._fields["tokens"] += ids
        self._fields["kind"] += kinds
        self._fields["image"] += [-1] * len(ids) if image is None else image
        self._fields["branch"] += [branch] * len(ids)
        if "marks" in self._fields:
            self._fields["marks"] += [0] * len(ids) if marks is None else marks
        self._fields["position"] += range(self._position, end)
        self._position = end
        if branch == 0:
            self._trunk = end

    def add_image(self, number: int, visual_tokens: int) -> None:
        """Appends the visual tokens of an image, which are always in the trunk."""
        image = range(number * visual_tokens, (number + 1) * visual_tokens)
        kinds = [int(TokenKind.IMAGE)] * visual_tokens
        self.add([0] * visual_tokens, kinds, branch=0, image=image)

    def row(self, name: str) -> Row:
        """The row of all tokens, as one document."""
        arrays = {name: np.asarray(values, np.int32) for name, values in self._fields.items()}
        return Row(**arrays, document=np.zeros_like(arrays["tokens"]), id=name)
