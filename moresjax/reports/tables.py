"""Tables of text, for pages and files."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"| {' | '.join(row)} |" for row in (self.head, ["---"] * len(self.head))]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", *lines])
