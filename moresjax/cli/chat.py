"""The conversation at the terminal of `moresjax generate`: questions, and commands with a slash."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moresjax.cli.options import marks_of
from moresjax.core.errors import UserError, choice_error

if TYPE_CHECKING:
    from moresjax.inference.chat import Chat
    from moresjax.inference.model import Model

HELP = """\
/image PATH...   images for the next question (quote paths with blanks); <image> says where one goes
/system [TEXT]   the system prompt from now on; without TEXT the template's own
/adapter [NAME]  the adapter that answers from now on, or base; without NAME tells which there are
/roi REGION      the part of these images that the tuning acts on, such as 0,0,0.5,1 or all
/mark NAME=TEXT  a piece of the next question that selectors mark(NAME) mean; may be repeated
/reset           forgets the conversation
/save FILE       writes the conversation as LLaVA JSON, which `data check` and training read
/help            these lines
/quit            ends, as Ctrl-D does; Ctrl-C stops an answer
A line ending in a backslash goes on in the next. A question that begins with / begins with //."""


class Terminal:
    """A person's conversation with a model.

    Answers go to the standard output, everything else to the standard error.

    Args:
      chat: The conversation.
      images: The images of the first question.
    """

    def __init__(self, chat: "Chat", images: Sequence[str] = ()) -> None:
        self._chat, self._images = chat, list(images)
        self._roi: str | None = None
        self._marks: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/system": self._system,
            "/adapter": self._adapter,
            "/reset": self._reset,
            "/save": self._save,
            "/roi": self._region,
            "/mark": self._mark,
            "/help": lambda _: _tell(HELP),
        }

    def run(self) -> None:
        """Asks and answers until the input ends or `/quit`."""
        with contextlib.suppress(ImportError):  # where there is none, lines have no history
            import readline  # noqa: F401
        while (line := _read()) not in (None, "/quit", "/exit"):
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line:
                    self._ask(line.removeprefix("/"))
            except UserError as error:  # the conversation stays as it was
                _tell(str(error))

    def _ask(self, question: str) -> None:
        said = {"roi": self._roi, "marks": marks_of(self._marks)}
        pieces = self._chat.ask(question, self._images, **said)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
            self._images, self._roi, self._marks = [], None, []
        except KeyboardInterrupt:
            pieces.close()
            print()
            _tell("stopped; the conversation is as it was before the question")
        else:
            print()

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise choice_error("command", name, (*self._commands, "/quit"))
        self._commands[name](rest.strip())

    def _image(self, paths: str) -> None:
        from moresjax.data.images import open_image

        try:
            given = shlex.split(paths)
        except ValueError as error:
            raise UserError(f"/image: {error}; a path with quotes or blanks is quoted") from None
        if not given:
            raise UserError("/image needs the path of an image, or several")
        if not self._chat.takes_images:
            raise UserError("this model takes no images")
        for path in given:
            open_image(path)
        self._images = given
        _tell(f"for the next question: {', '.join(given)}")

    def _region(self, text: str) -> None:
        from moresjax.data.region_providers import region_provider

        region_provider(text)
        self._roi = text
        _tell(f"region of the next question's images: {text}")

    def _mark(self, text: str) -> None:
        marks_of([text], "/mark")
        self._marks.append(text)
        _tell(f"marked in the next question: {', '.join(self._marks)}")

    def _system(self, text: str) -> None:
        self._chat.system = text or None
        _tell(f"system prompt: {text or 'that of the template'}")

    def _adapter(self, name: str) -> None:
        from moresjax.tuning.multi_adapter import BASE

        names = self._chat.adapters
        if not names:
            raise UserError("there are no adapters to choose from: --adapter NAME=DIR loads some")
        if name:
            if name not in (*names, BASE):
                raise choice_error("adapter", name, (*names, BASE))
            self._chat.adapter = None if name == BASE else name
        _tell(f"adapter: {self._chat.adapter or BASE} of {', '.join((*names, BASE))}")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._images, self._roi, self._marks = [], None, []
        _tell("the conversation is forgotten")

    def _save(self, file: str) -> None:
        if not file:
            raise UserError("/save needs the name of a file")
        _tell(f"{self._chat.save(file)}: {len(self._chat.turns)} questions and answers")


def chat_at_terminal(model: "Model", title: str, images: Sequence[str], options: dict) -> None:
    """A conversation with a model, after a banner that says what answers.

    Args:
      model: The model.
      title: What the banner calls it.
      images: The images of the first question.
      options: The arguments of `Chat`.
    """
    from moresjax.data.templates import template_name
    from moresjax.inference.chat import Chat

    adapter = model.adapters[0] if model.adapters else None
    chat = Chat(model, adapter=adapter, **options)
    lines = [
        title + str(model).removeprefix("Model"),
        f"  template: {template_name(model.prompts.processor.template)}",
        *([f"  system prompt: {chat.system}"] if chat.system else []),
        *([f"  answering: {adapter}"] if adapter else []),
        "/image PATH..., /reset, /adapter, /save FILE, /system TEXT, /help; Ctrl-D ends",
    ]
    _tell("\n".join(lines))
    Terminal(chat, images).run()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read() -> str | None:
    """The next question or command; None at the end of the input.

    Lines that end in a backslash are joined with the next; Ctrl-C drops what was typed.
    """
    lines: list[str] = []
    while True:
        try:
            line = input(". " if lines else "> ")
        except EOFError:
            if sys.stdin.isatty():
                _tell("")  # what comes next begins a line of its own
            return "\n".join(lines).strip() if lines else None
        except KeyboardInterrupt:
            _tell("\n(Ctrl-D or /quit ends the conversation)")
            lines = []
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()
