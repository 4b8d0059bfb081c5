"""The one exception a user is meant to read."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a command or the data, told in one sentence.

    The command line prints it without a traceback and exits with code 2.
    """


class UnknownName(UserError):
    """A name, or another value, that is none of those allowed."""


def choice_error(what: str, value: object, allowed: Iterable[object]) -> UnknownName:
    """`UnknownName` that names the value, the allowed values and the place they belong to."""
    names = ", ".join(str(a) for a in allowed)
    return UnknownName(f"unknown {what} {str(value)!r}; choose from: {names}")
