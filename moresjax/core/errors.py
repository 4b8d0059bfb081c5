"""The one exception a user is meant to read."""

import difflib
from collections.abc import Iterable

LONGEST = 400  # characters of a message
_LONGEST_VALUE = 80  # characters of a value that a message quotes
_ENDING = 120  # characters that a message which is cut keeps of its end


class UserError(ValueError):
    r"""A mistake in a config, a command or the data, told in one sentence.

    The command line prints it without a traceback and exits with code 2. The sentence has at most
    `LONGEST` characters, all of them printable: what a file or a command holds may be long, have
    lines and control a terminal.

    >>> str(UserError("the name a\nb is taken"))
    'the name a b is taken'
    >>> len(str(UserError("x" * 10_000)))
    400
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_sentence(str(message)))


class UnknownName(UserError):
    """A name, or another value, that is none of those allowed."""


def choice_error(
    what: str, value: object, allowed: Iterable[object], besides: str = ""
) -> UnknownName:
    """`UnknownName` that names the value, the allowed values and the place they belong to.

    Where the allowed values are too many for a message, those most like the value are named.

    Args:
      what: What the value is the name of.
      value: The value.
      allowed: The allowed values.
      besides: What else is allowed, in words, such as `or a file`.
    """
    told = shortened(str(value))
    names = [str(name) for name in allowed]
    text = f"unknown {shortened(what, 160)} {told!r}; choose from: "
    ending = f", {besides}" if besides else ""
    if len(text) + len(", ".join(names)) + len(ending) <= LONGEST:
        return UnknownName(text + ", ".join(names) + ending)
    nearest = difflib.get_close_matches(told, names, len(names), cutoff=0.0)
    while nearest and len(text) + len(", ".join(nearest)) + len(ending) > LONGEST - 20:
        nearest.pop()
    more = f" and {len(names) - len(nearest)} more"
    return UnknownName(f"{text}{', '.join(nearest)}{more}{ending}")


def shortened(text: str, most: int = _LONGEST_VALUE) -> str:
    """A text of at most `most` characters, cut in the middle.

    >>> shortened("a" * 50 + "b" * 50, 11)
    'aaaaaa...bb'
    """
    if len(text) <= most:
        return text
    ending = min(_ENDING, (most - 3) // 3)
    return f"{text[: most - 3 - ending]}...{text[len(text) - ending :]}"


def _sentence(text: str) -> str:
    text = shortened(text, 10 * LONGEST)
    if not text.isprintable():
        printed = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
        text = "".join(printed)
    return shortened(text, LONGEST)
