"""Tables as text, and differences in hundredths."""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, below its title."""
        return f"### {self.title}\n\n{markdown_table(self.head, self.rows)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["method", "score"], [["lora", "0.9"]]))
    | method | score |
    | --- | --- |
    | lora | 0.9 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_points(mean: float, interval95: tuple[float, float] | None) -> str:
    """A difference of shares in hundredths, with its interval where it has one.

    >>> in_points(0.031, (0.01, 0.052))
    '+3.1 [+1.0, +5.2]'
    """
    text = f"{100 * mean:+.1f}"
    if interval95 is None:
        return text
    low, high = interval95
    return f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"
