"""The range of every number that a user sets: declared beside the field, checked in one place.

A dataclass annotates a field with its range, `rank: Annotated[int, Range(1)] = 8`; `check_ranges`
refuses a value outside of it. A number without a range of its own must be finite.
"""

import dataclasses
import functools
import math
import typing
from typing import Annotated, Any

from moresjax.core.errors import UserError

Number = int | float


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    >>> Range(0, below=1).check("lora:dropout", 7)
    Traceback (most recent call last):
    ...
    moresjax.core.errors.UserError: lora:dropout must be at least 0 and below 1, got 7

    Attributes:
      least: The smallest number.
      most: The largest number.
      above: Every number is larger than this.
      below: Every number is smaller than this.
      also: Single numbers that are allowed besides.
      limit: The largest whole number where there is no `most`: what a machine can hold. It is only
        told to who is beyond it.
    """

    least: Number = -math.inf
    most: Number = math.inf
    above: Number = -math.inf
    below: Number = math.inf
    also: tuple[Number, ...] = ()
    limit: int = (1 << 31) - 1

    def __contains__(self, number: Number) -> bool:
        if self._is_beyond(number) or (isinstance(number, float) and not math.isfinite(number)):
            return False
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside or number in self.also

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "below": self.below}
        words["at most"] = self.most
        limits = [f"{word} {x}" for word, x in words.items() if math.isfinite(x)]
        choices = [str(x) for x in self.also] + [" and ".join(limits) or "a finite number"]
        return " or ".join(choices)

    def check(self, what: str, number: Number) -> None:
        """Refuses a number outside of the range.

        Raises:
          UserError: Names the setting, its range and the number.
        """
        if number not in self:
            limit = f" and at most {self.limit:,d}" if self._is_beyond(number) else ""
            bits = number.bit_length() if isinstance(number, int) else 0
            got = f"a number of {bits} bits" if bits > 64 else number
            raise UserError(f"{what} must be {self}{limit}, got {got}")

    def _is_beyond(self, number: Number) -> bool:
        return isinstance(number, int) and math.isinf(self.most) and abs(number) > self.limit


FINITE = Range()
AnyInt = Annotated[int, FINITE]
Positive = Annotated[int, Range(1)]
# The rank, the tokens, the factors or the blocks of a tuning: what arrays are as large as.
Size = Annotated[int, Range(1, limit=1 << 16)]
Depth = Annotated[int, Range(1, limit=256)]  # of what is not scanned but built block by block
Layers = Annotated[int, Range(1, limit=10_000)]
Width = Annotated[int, Range(1, limit=1 << 20)]
NonNegative = Annotated[int, Range(0)]
Finite = Annotated[float, FINITE]
AboveZero = Annotated[float, Range(above=0)]
AtLeastZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
# The rate of a dropout, or of a decay.
Rate = Annotated[float, Range(0, below=1)]


@functools.cache
def ranges_of(kind: type) -> dict[str, Range]:
    """The ranges that a dataclass declares, by field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        for extra in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(extra, Range):
                found[field.name] = extra
    return found


def check_ranges(values: Any, prefix: str = "") -> None:
    """Refuses a dataclass with a number outside of its range, at any depth.

    Args:
      values: A dataclass; the numbers in its tuples and mappings are checked, too.
      prefix: What stands before the name of a field in the error message.

    Raises:
      UserError: Names the field, its range and the number.
    """
    ranges = ranges_of(type(values))
    for field in dataclasses.fields(values):
        name, value = prefix + field.name, getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        else:
            check_value(name, value, ranges.get(field.name, FINITE))


def check_value(name: str, value: Any, allowed: Range) -> None:
    """Checks a number or a text, or all of a tuple; numbers of a mapping must be finite.

    Raises:
      UserError: Names the setting, its range and the number, or tells of a text's zero byte.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_value(f"{name}.{key}", item, FINITE)
    elif isinstance(value, tuple):
        for item in value:
            check_value(name, item, allowed)
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} has a zero byte, which no text and no path may have")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        allowed.check(name, value)
