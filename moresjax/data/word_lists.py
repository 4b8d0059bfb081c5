"""Lists of words, such as colours, that captions are searched for.

Those of the package are the lists of "Analyzing Fine-tuning Representation Shift for Multimodal
LLMs Steering" (arXiv 2501.03012) in `moresjax/data/words/`, with their licence.
"""

import functools
from importlib import resources
from pathlib import Path

from moresjax.core.errors import UserError, choice_error

NAMES = ("colors", "places", "sentiments", "positive", "negative")


def word_list(name: str | Path) -> tuple[str, ...]:
    """The words of a list of the package, or of a text file.

    >>> word_list("colors")[:3], len(word_list("sentiments"))
    (('red', 'blue', 'green'), 145)

    Args:
      name: One of `NAMES`, or a file with words on lines of their own or between commas.

    Returns:
      The words in lower case, each once, in order.

    Raises:
      UserError: The list is unknown, or the file is no text or holds no word.
    """
    if name in NAMES:
        return _own(str(name))
    path = Path(name)
    if not path.is_file():
        raise choice_error("list of words", name, (*NAMES, "a file of words"))
    try:
        words = _words(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; a list of words has one on each line") from None
    if not words:
        raise UserError(f"{path} holds no words")
    return words


@functools.cache
def _own(name: str) -> tuple[str, ...]:
    file = resources.files("moresjax.data").joinpath(f"words/{name}.txt")
    return _words(file.read_text(encoding="utf-8"))


def _words(text: str) -> tuple[str, ...]:
    pieces = (piece.strip().lower() for line in text.splitlines() for piece in line.split(","))
    return tuple(dict.fromkeys(piece for piece in pieces if piece))
