"""Fields of a request, read one by one: what is missing or null has its default."""

from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.serve.errors import ApiError


class Fields:
    """The fields of a JSON object, with errors that name them.

    >>> Fields({"n": 2, "stop": None}).whole("n", 1, 1, 8)
    2

    Args:
      body: The object.
      path: What stands before the names of its fields in messages.

    Raises:
      ApiError: It is no object.
    """

    def __init__(self, body: Any, path: str = "") -> None:
        if not isinstance(body, Mapping):
            raise ApiError(f"{path or 'the request'} must be a JSON object")
        self._body, self._path = body, f"{path}." if path else ""

    def get(self, name: str) -> Any:
        """The value of a field; None where it is missing."""
        return self._body.get(name)

    def wrong(self, name: str, what: str) -> ApiError:
        """The error that a field must be `what`."""
        value = str(self._body.get(name))[:80]
        return ApiError(f"{self._path}{name} must be {what}, got {value}", param=self._path + name)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number between two others."""
        value = self.get(name)
        if value is None:
            return default
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number between two others."""
        value = self.get(name)
        if value is None:
            return default
        fine = isinstance(value, int) and not isinstance(value, bool)
        if not fine or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def texts(self, name: str, most: int = 64) -> tuple[str, ...]:
        """A text or a list of texts that are not empty."""
        value = self.get(name)
        if value is None:
            return ()
        given = [value] if isinstance(value, str) else value
        fine = isinstance(given, Sequence) and len(given) <= most
        if not fine or not all(isinstance(text, str) for text in given):
            raise self.wrong(name, f"a text or a list of at most {most} texts")
        return tuple(text for text in given if text)
