"""New tokens as text: stop strings, and pieces of a text that is still growing."""

from collections.abc import Callable, Sequence

from moresjax.core.errors import UserError
from moresjax.core.types import Ids

# A decoder writes this for bytes that are no character, or not yet one.
_INCOMPLETE = "\ufffd"


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
      UserError: A stop string is empty.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UserError("a stop string is empty")
    return stops


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Whether there is a stop string in the text."""
    return any(stop in text for stop in stops)


class TextStream:
    """Cuts a growing token sequence into pieces of text that never change again.

    The pieces joined are the whole text, cut at the first stop string and stripped. The stream
    holds back characters whose bytes are still missing, blanks, and what may become a stop string.

    >>> stream = TextStream(lambda ids: "".join("ab.c"[i] for i in ids), stops=["."])
    >>> stream.push([0, 1]), stream.push([0, 1, 2, 3])
    ('ab', '')

    Attributes:
      text: The text so far.

    Args:
      decode: Turns token ids into text.
      stops: Strings before the first of which the text ends.
      strip: Whether blanks around the whole text are left out.
    """

    def __init__(
        self, decode: Callable[[Ids], str], stops: Sequence[str] = (), *, strip: bool = True
    ) -> None:
        self._decode, self._stops, self._strip = decode, tuple(stops), strip
        self.text = ""

    def push(self, ids: Ids, final: bool = False) -> str:
        """The next piece, possibly empty.

        Args:
          ids: All tokens so far.
          final: Whether no more tokens will come; then nothing is held back.
        """
        whole = self._decode(ids)
        ready = cut_at_stop(whole, self._stops)
        if not final and ready == whole:
            ready = ready.rstrip(_INCOMPLETE)
            ready = ready[: len(ready) - max(_overlap(ready, stop) for stop in ("", *self._stops))]
        piece = (ready.strip() if self._strip else ready)[len(self.text) :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` a stop string could begin with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
