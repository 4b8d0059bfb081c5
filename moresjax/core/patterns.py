"""Patterns that users and files give, matched in bounded time."""

import contextlib
import functools
import re
from collections.abc import Iterator

import regex

from moresjax.core.errors import UserError

LONGEST = 1000  # characters of a pattern
SECONDS = 1.0  # that one name may take; patterns in use take some millionths


@functools.lru_cache(256)
def _compiled(pattern: str, what: str) -> regex.Pattern[str]:
    if len(pattern) > LONGEST:
        raise UserError(f"{what} has {len(pattern):,d} characters; at most {LONGEST} are read")
    try:
        re.compile(pattern)  # what is Python's own syntax, and no more
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise UserError(f"{what} {pattern!r} is not a regular expression: {error}") from None


def full_match(pattern: str, name: str, what: str = "pattern") -> bool:
    """Whether a regular expression describes all of a name.

    >>> full_match("llm[.].*[.]q[.].*", "llm.blocks.attn.q.kernel")
    True

    Args:
      pattern: A regular expression in Python's syntax.
      name: The name, such as that of a parameter or a module.
      what: What the message calls the pattern.

    Raises:
      UserError: The pattern is malformed, too long, or takes too long because its repetitions
        stand in each other.
    """
    with _in_time(pattern, what):
        return _compiled(pattern, what).fullmatch(name, timeout=SECONDS) is not None


def match_start(pattern: str, name: str, what: str = "pattern") -> regex.Match[str] | None:
    """What a regular expression finds at the beginning of a name; see `full_match`.

    Raises:
      UserError: The pattern is malformed, too long, or takes too long.
    """
    with _in_time(pattern, what):
        return _compiled(pattern, what).match(name, timeout=SECONDS)


@contextlib.contextmanager
def _in_time(pattern: str, what: str) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, MemoryError):
        raise UserError(
            f"{what} {pattern!r} takes too long to match; a repetition must not repeat another one"
        ) from None
