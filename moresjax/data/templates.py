"""Conversation templates: a sample becomes pieces of text that know their segment and branch."""

import dataclasses

from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.errors import choice_error
from moresjax.layout import Segment


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    segment: Segment
    branch: int = 0


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
      system: text before the first turn.
      user: role marker before a question.
      assistant: role marker after a question; an answer follows after `gap`.
      keep_question: False writes images and answers only, without markers (connector pretraining).
    """

    system: str = ""
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    keep_question: bool = True

    def render(self, sample: Sample, eos: str) -> list[Piece]:
        """The pieces of a sample in order; joined they are the conversation's text.

        An answer follows its marker after a blank and ends with `eos`; text that goes on from the
        context ends with a newline. A prompt (last answer None) ends with the assistant marker.
        """
        if not self.keep_question:
            caption = dataclasses.replace(sample.turns[0], question=None)
            images = IMAGE_MARK * len(sample.images)
            return [Piece(images, Segment.QUESTION), *self._turn(caption, eos, 0)]
        # Everything before the first word of the user is the system's, also the first role marker.
        pieces = [Piece(self.system + self.user, Segment.SYSTEM)]
        pieces.append(Piece(sample.context, Segment.QUESTION))
        for number, turn in enumerate(sample.turns):
            if number and not sample.independent:
                pieces.append(Piece(self.user, Segment.QUESTION))
            pieces += self._turn(turn, eos, number + 1 if sample.independent else 0)
        return [piece for piece in pieces if piece.text]

    def _turn(self, turn: Turn, eos: str, branch: int) -> list[Piece]:
        if turn.question is None:
            answer = () if turn.answer is None else (f"{turn.answer}\n",)
            return [Piece(text, Segment.ANSWER, branch) for text in answer]
        pieces = [Piece(turn.question + self.assistant, Segment.QUESTION, branch)]
        if turn.answer is not None:
            pieces.append(Piece(f" {turn.answer}{eos}", Segment.ANSWER, branch))
        return pieces


_LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)

TEMPLATES = {
    "vicuna_v1": Template(system=_LLAVA_SYSTEM),
    "phi": Template(system=_LLAVA_SYSTEM),
    "plain": Template(keep_question=False),
    "bare": Template(user="", assistant=""),  # no markers at all
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
      UserError: for an unknown name.
    """
    if name not in TEMPLATES:
        raise choice_error("template", name, TEMPLATES)
    return TEMPLATES[name]
