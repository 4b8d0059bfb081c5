"""Questions with an indicator: the word whose token the text editor changes.

MRT asks "Is the object an e in the image?" (its 5th word) or "Is the object in the image an e?"
(its 8th), and six paraphrases, which a rephraser leads back to the first. The paper writes "an"
before every class; here the article is the one that the class takes.
"""

import dataclasses
import re
from collections.abc import Sequence

from moresjax.core.errors import UserError

INDICATOR = "indicator"  # the name of the mark


@dataclasses.dataclass(frozen=True)
class Marked:
    """A question, and where its indicator stands.

    >>> Phrasing("Is it {e}?").ask("cat")
    Marked(text='Is it a cat?', span=(8, 11))

    Attributes:
      text: The question.
      span: The indicator's first character, and the one after its last.
    """

    text: str
    span: tuple[int, int]

    @property
    def indicator(self) -> str:
        """The marked word or words."""
        return self.text[slice(*self.span)]

    def after(self, prefix: str) -> "Marked":
        """The same behind other text."""
        start, end = self.span
        return Marked(prefix + self.text, (start + len(prefix), end + len(prefix)))


def article(name: str) -> str:
    """The indefinite article that a word takes.

    >>> article("airplane"), article("cat")
    ('an', 'a')
    """
    return "an" if name[:1].lower() in "aeiou" else "a"


@dataclasses.dataclass(frozen=True)
class Phrasing:
    """A way to ask whether a class is there.

    >>> Phrasing("Is the object {e} in the image?").word
    5

    Attributes:
      text: The question, with `{e}` for article and indicator.
      article: The article; empty: the one that the class takes.
    """

    text: str
    article: str = ""

    def ask(self, name: str) -> Marked:
        """The question about a class."""
        before, after = self.text.split("{e}")
        before = f"{before}{self.article or article(name)} "
        return Marked(f"{before}{name}{after}", (len(before), len(before) + len(name)))

    @property
    def word(self) -> int:
        """The place of the indicator among the words, counted from 1."""
        return len(self.text.split("{e}")[0].split()) + 2

    def indicator(self, text: str) -> str | None:
        """The class that a question of this phrasing is about; None for another question.

        >>> Phrasing("Is there {e} in it?").indicator("Is there an old cat in it?")
        'old cat'
        """
        before, after = (re.escape(part) for part in self.text.split("{e}"))
        found = re.fullmatch(f"{before}an? (.+?){after}", text.strip(), re.IGNORECASE)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """The ways to ask that a data set has.

    Attributes:
      trained: Those that have editors of their own, by number.
      paraphrases: Others, which a rephraser leads back to a trained one.
    """

    trained: tuple[Phrasing, ...]
    paraphrases: tuple[Phrasing, ...]

    def number(self, number: int) -> Phrasing:
        """A trained phrasing; the first is 1.

        Raises:
          UserError: There is none of that number.
        """
        if not 1 <= number <= len(self.trained):
            raise UserError(f"phrasing must be 1 to {len(self.trained)}, got {number}")
        return self.trained[number - 1]


def _all(*texts: str, article: str = "") -> tuple[Phrasing, ...]:
    return tuple(Phrasing(text, article) for text in texts)


# Table S11, in its order.
OBJECTS = Phrasings(
    _all("Is the object {e} in the image?", "Is the object in the image {e}?"),
    _all(
        "Is there {e} object visible in the image?",
        "Does the image contain an object that is {e}?",
        "Is the object shown in the image {e}?",
        "Is the object in the picture {e}?",
        "Do you recognize the object in the image as {e}?",
        "Can you tell if the object shown in the image is specifically {e}?",
    ),
)
# The digits world knows one article.
DIGITS = Phrasings(
    _all("is there {e} ?", "is {e} there ?", article="a"), _all("is {e} there ?", article="a")
)


def word_span(text: str, number: int) -> tuple[int, int]:
    """The characters of the word of that number, without punctuation after it.

    >>> text = "what is the brand, please?"
    >>> text[slice(*word_span(text, 4))]
    'brand'

    Args:
      text: The text.
      number: Counts words from 1.

    Raises:
      UserError: The text has fewer words.
    """
    words = list(re.finditer(r"\S+", text))
    if not 1 <= number <= len(words):
        raise UserError(f"word {number} is asked for, and {text!r} has {len(words)} words")
    start, end = words[number - 1].span()
    return start, start + len(text[start:end].rstrip(".,;:?!"))


def find_indicator(text: str, name: str) -> Marked | None:
    """A text with the one place of a word marked; None where it is not there, or several times.

    >>> find_indicator("Is the object a cat in the image?", "cat").span
    (16, 19)
    """
    pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
    found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    return Marked(text, found[0]) if len(found) == 1 else None


def check_class(name: str, classes: Sequence[str], what: str, data: str) -> str:
    """The class, if the data set has it.

    Raises:
      UserError: It has no such class, or none was named.
    """
    if not name:
        raise UserError(f"{what} needs its class; choose from: {', '.join(classes)}")
    if name not in classes:
        raise UserError(f"{data} has no class {name!r}; choose from: {', '.join(classes)}")
    return name
