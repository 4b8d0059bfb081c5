"""Conversation templates: a sample becomes pieces of text that know their kind and branch."""

import dataclasses

from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import TokenKind
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import add_entry
from moresjax.core.types import Tokenizer
from moresjax.data.samples import IMAGE_MARK, LATER_TURNS, Sample, Turn


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text of a conversation.

    Attributes:
      text: The text; `<image>` in it stands for an image.
      kind: What its tokens are for.
      branch: 0 for the trunk of the conversation, k for its k-th independent question.
      control: Whether the template wrote it, so that its control tokens are meant as such.
      turn: The number of the turn whose question it is from; None for all other texts.
      start: Its first character in that question.
    """

    text: str
    kind: TokenKind
    branch: int = 0
    control: bool = False
    turn: int | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written.

    >>> template = Template(system="Be brief. ", user="Q: ", assistant=" A:")
    >>> sample = Sample("cat", (Turn("who ?", "me"),))
    >>> "".join(piece.text for piece in template.render(sample, eos="</s>"))
    'Be brief. Q: who ? A: me</s>'

    Attributes:
      system: The text before the first turn.
      user: The role marker before a question.
      assistant: The role marker after a question.
      gap: What stands between the marker and the answer.
      end: What closes an answer and is trained with it; None stands for the tokenizer's end token.
      next_user: The marker of later questions where it differs from the first.
      keep_question: False writes images and answers only, without markers (connector pretraining).
      around_system: What stands before and after a conversation's own system prompt, which together
        take the place of `system`; None where the template has no place for one.
      around_image: What stands before and after every image, in the place of the blanks that follow
        its mark in the text of a user; None for nothing.
      task: What stands before a question about images, such as `[vqa] `.
    """

    system: str = ""
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    gap: str = " "
    end: str | None = None
    next_user: str | None = None
    keep_question: bool = True
    # Without a part in the text by which predictions tell templates apart.
    around_system: tuple[str, str] | None = dataclasses.field(default=None, repr=False)
    around_image: tuple[str, str] | None = dataclasses.field(default=None, repr=False)
    task: str = dataclasses.field(default="", repr=False)

    def render(self, sample: Sample, eos: str) -> list[Piece]:
        """The pieces of a sample in order; joined they are the conversation's text.

        Text that goes on from the context ends with a newline. A prompt (last answer None) ends
        with the assistant marker.

        Raises:
          UserError: The sample has a system prompt, for which this template has no place.
        """
        if sample.system is not None and self.around_system is None:
            raise UserError(
                f"sample {sample.id}: it has a system prompt, for which the template has no place"
            )
        end = eos if self.end is None else self.end
        if not self.keep_question:
            caption = dataclasses.replace(sample.turns[0], question=None)
            images = IMAGE_MARK * len(sample.images)
            pieces = [Piece(images, TokenKind.QUESTION, control=True)]
            return [*pieces, *self._turn([], caption, end, 0)]
        # Everything before the first word of the user is the system's, also the first role marker.
        pieces, (shared, gap) = self._opening(sample.system), _shared_context(sample)
        pieces += self._user_text(shared, first=True)
        behind_image = self.around_image is not None and shared.rstrip().endswith(IMAGE_MARK)
        if self.around_image is not None and behind_image and sample.independent:
            # What follows the image is tokenised with each question.
            gap = self.around_image[1]
            pieces[-2:] = [dataclasses.replace(pieces[-2], text=IMAGE_MARK)]
        marker = self.user if self.next_user is None else self.next_user
        for number, turn in enumerate(sample.turns):
            branch = number + 1 if sample.independent else 0
            if sample.independent:
                pieces.append(Piece(gap, TokenKind.QUESTION, branch, control=behind_image))
            elif number:
                pieces.append(Piece(marker, TokenKind.QUESTION, control=True))
            question = self._user_text(
                turn.question or "",
                branch,
                turn=number,
                task=self.task if sample.images else "",
                first=not (number or shared),
                behind_image=behind_image and (sample.independent or not number),
            )
            pieces += self._turn(question, turn, end, branch)
        return [piece for piece in pieces if piece.text]

    def left_out(self, sample: Sample) -> str:
        """What of a sample this template does not write, in a sentence; empty for nothing."""
        more = 0 if self.keep_question else len(sample.turns) - 1
        return f"{LATER_TURNS} are left out by the template: {more}" if more else ""

    def _opening(self, system: str | None) -> list[Piece]:
        if system is None or self.around_system is None:
            return [Piece(self.system + self.user, TokenKind.SYSTEM, control=True)]
        before, after = self.around_system
        return [
            Piece(before, TokenKind.SYSTEM, control=True),
            Piece(system, TokenKind.SYSTEM),
            Piece(after + self.user, TokenKind.SYSTEM, control=True),
        ]

    def _user_text(
        self,
        text: str,
        branch: int = 0,
        *,
        turn: int | None = None,
        task: str = "",
        first: bool = False,
        behind_image: bool = False,
    ) -> list[Piece]:
        """A text of the user, with what stands around its images.

        Args:
          text: The text.
          branch: Its branch.
          turn: The number of the turn whose question it is.
          task: What stands before it, behind its images.
          first: Whether nothing of the user precedes it: the system's text goes on up to its image.
          behind_image: Whether it follows an image.
        """
        kind = TokenKind.QUESTION
        before, after = self.around_image or ("", "")
        parts, pieces, start = text.split(IMAGE_MARK), [], 0
        if self.around_image is None and not task:
            return [Piece(text, kind, branch, turn=turn)]
        for number, part in enumerate(parts):
            if number:
                opening = first and number == 1 and not parts[0]
                pieces += [
                    Piece(before, TokenKind.SYSTEM if opening else kind, branch, control=True),
                    Piece(IMAGE_MARK + after, kind, branch, control=True),
                ]
            if task and number == len(parts) - 1:
                pieces.append(Piece(task, kind, branch, control=True))
            bare = part.lstrip() if self.around_image and (number or behind_image) else part
            own = start + len(part) - len(bare)
            pieces.append(Piece(bare, kind, branch, turn=turn, start=own))
            start += len(part) + len(IMAGE_MARK)
        return pieces

    def _turn(self, question: list[Piece], turn: Turn, end: str, branch: int) -> list[Piece]:
        if turn.question is None:
            answer = () if turn.answer is None else (f"{turn.answer}\n",)
            return [Piece(text, TokenKind.ANSWER, branch) for text in answer]
        pieces = [*question, Piece(self.assistant, TokenKind.QUESTION, branch, control=True)]
        if turn.answer is not None:
            pieces += [
                Piece(self.gap, TokenKind.ANSWER, branch, control=True),
                Piece(turn.answer, TokenKind.ANSWER, branch),
                Piece(end, TokenKind.ANSWER, branch, control=True),
            ]
        return pieces

    @property
    def markers(self) -> str:
        """All that the template writes itself, but for the tokenizer's end token."""
        texts = (self.system, self.user, self.assistant, self.gap, self.end, self.next_user)
        texts += (*(self.around_system or ()), *(self.around_image or ()), self.task)
        return "\n".join(text for text in texts if text)


def _shared_context(sample: Sample) -> tuple[str, str]:
    """What independent questions share of the context, and the blanks that each begins with.

    Text behind an image is tokenised anew. Where it is blank it belongs to the questions, whose
    tokens are then those that each has alone.
    """
    head, mark, gap = sample.context.rpartition(IMAGE_MARK)
    if sample.independent and mark and not gap.strip():
        return head + mark, gap
    return sample.context, ""


_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_LLAVA = Template(system=f"{_SYSTEM} ", around_system=("", " "))


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_MINIGPT = Template(
    user="[INST] ", assistant=" [/INST]", around_image=("<Img>", "</Img> "), task="[vqa] "
)

# The first group is that of LLaVA and its factories; they differ in the tokenizer's end token only.
# The second is that of the LLMs' own chat versions, the third MiniGPT-v2's, by task.
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _LLAVA,
    "phi": _LLAVA,
    "gemma": _LLAVA,
    "plain": Template(keep_question=False),
    "bare": Template(user="", assistant=""),  # no markers at all
    "llama2": Template(
        system=f"[INST] <<SYS>>\n{_SYSTEM}\n<</SYS>>\n\n",
        user="",
        assistant=" [/INST]",
        end=" </s>",
        next_user="<s>[INST] ",
        around_system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    ),
    "mistral": Template(user="[INST] ", assistant=" [/INST]"),
    "llama3": Template(
        system=f"{_header('system')}{_SYSTEM}<|eot_id|>",
        user=_header("user"),
        assistant=f"<|eot_id|>{_header('assistant')}",
        gap="",
        end="<|eot_id|>",
        around_system=(_header("system"), "<|eot_id|>"),
    ),
    "chatml": Template(
        system=f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        gap="",
        end="<|im_end|>",
        next_user="\n<|im_start|>user\n",
        around_system=("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    "gemma3": Template(
        system="<start_of_turn>user\n",
        user="",
        assistant="<end_of_turn>\n<start_of_turn>model\n",
        gap="",
        end="<end_of_turn>",
        next_user="\n<start_of_turn>user\n",
        around_system=("<start_of_turn>user\n", "\n\n"),
        around_image=("\n\n<start_of_image>", "<end_of_image>\n\n"),
    ),
    "minigpt_v2": _MINIGPT,
    "minigpt_v2_caption": dataclasses.replace(_MINIGPT, task="[caption] "),
    "minigpt_v2_chat": dataclasses.replace(_MINIGPT, task=""),
}


# Names a tokenizer's own chat template.
OWN = "tokenizer"


def register_template(name: str, template: Template) -> None:
    """Makes a template available to `config.template` under a name.

    >>> register_template("brief", Template(system="Be brief. "))
    >>> get_template("brief").system
    'Be brief. '

    Raises:
      UserError: The name belongs to another template.
    """
    if name == OWN:
        raise UserError(f"the template name {OWN!r} stands for the tokenizer's own template")
    add_entry(TEMPLATES, "template", name, template)


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The template of that name, which may be a plug-in's.

    Args:
      name: A name in `TEMPLATES`, or `tokenizer` for the tokenizer's own chat template.
      tokenizer: The tokenizer, for its own chat template.

    Raises:
      UserError: The name is unknown, or the tokenizer's chat template cannot be used.
    """
    if name == OWN and tokenizer is not None:
        return chat_template(tokenizer)
    load_plugins()
    if name not in TEMPLATES:
        raise choice_error("template", name, (*TEMPLATES, OWN))
    return TEMPLATES[name]


def template_name(template: Template) -> str:
    """The names of a template, joined by `/`; `tokenizer` for one that has no name.

    >>> template_name(get_template("phi"))
    'vicuna_v1/phi/gemma'
    """
    names = [name for name, known in TEMPLATES.items() if known == template]
    return "/".join(names) or OWN


def chat_template(tokenizer: Tokenizer) -> Template:
    """What a tokenizer's own chat template writes around questions and answers.

    It is found by writing conversations with known words in their places.

    Raises:
      UserError: The tokenizer has none, or one that writes earlier rounds differently once there
        are later ones.
    """
    if not tokenizer.chat_template:
        raise UserError(f"template {OWN!r}: the tokenizer has no chat template of its own")
    first, answer, second = "FirstQuestion", "TheAnswer", "SecondQuestion"

    def written(*contents: str, prompt: bool, own_system: str = "") -> str:
        roles = ("user", "assistant", "user")
        rounds = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        if own_system:
            rounds.insert(0, {"role": "system", "content": own_system})
        return tokenizer.apply_chat_template(rounds, add_generation_prompt=prompt, tokenize=False)

    system, _, assistant = written(first, prompt=True).partition(first)
    opening, _, end = written(first, answer, prompt=False).partition(answer)
    earlier, _, later = written(first, answer, second, prompt=True).partition(answer)
    next_user, _, closing = later.partition(second)
    gap = opening.removeprefix(system + first + assistant)
    whole = system + first + assistant + gap
    if not (earlier == opening == whole and next_user.startswith(end) and closing == assistant):
        raise UserError(
            f"template {OWN!r}: the tokenizer's chat template changes what it wrote when a "
            "conversation goes on"
        )
    try:
        whole = written(first, answer, second, prompt=True, own_system="TheSystem")
    except Exception:  # whatever a chat template raises that knows no system prompt
        whole = ""
    rest = first + earlier.partition(first)[2] + answer + later
    before, found, after = whole.removesuffix(rest).partition("TheSystem")
    around = (before, after) if found and whole.endswith(rest) else None
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        system = system.removeprefix(bos)  # the tokenizer puts it there
        around = around and (around[0].removeprefix(bos), around[1])
    return Template(
        system=system,
        user="",
        assistant=assistant,
        gap=gap,
        end=end,
        next_user=next_user.removeprefix(end),
        around_system=around,
    )
