"""An extension of griffe, which reads docstrings for the site: their examples become code."""

import re

import griffe

# Lines from the first `>>>` to the next blank line.
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """A docstring whose doctests are fenced code blocks."""
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class FencedDoctests(griffe.Extension):
    """Applied to the docstring of everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Changes the docstring before it is split into sections."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
