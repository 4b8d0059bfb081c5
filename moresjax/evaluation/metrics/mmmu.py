"""MMMU: finding the answer in a free response, and accuracy by subject and domain.

Source: Yue et al. 2024 and the evaluation of `MMMU-Benchmark/MMMU`. A multiple-choice response
without a recognisable option gets a random one there, from one generator seeded with 42; the
generator is an argument here, so that the guesses are the same and can be counted.
"""

import random
import re
from collections.abc import Mapping, Sequence

from moresjax.core.errors import UserError, choice_error

SEED = 42
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}

_EDGE_MARKS = ",.!?;:'"  # They are stripped one after the other, in this order.
_LONG_RESPONSE = 5  # Only responses of more words are searched for the text of an option.
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1.2, and none of these
)


def find_option(response: str, options: Mapping[str, str]) -> str | None:
    """The option a response chooses, or None.

    It may say `(B)`, a lone `B`, or, in more than five words, the text of an option; the option
    that is mentioned last wins.

    >>> find_option("The answer is (B).", {"A": "salt", "B": "tea"})
    'B'

    Args:
      response: The generated text.
      options: Letter -> text.
    """
    for mark in _EDGE_MARKS:
        response = response.strip(mark)
    response = f" {response} "
    places = {letter: response.rfind(f"({letter})") for letter in options}
    if max(places.values()) < 0:
        places = {letter: response.rfind(f" {letter} ") for letter in options}
    if max(places.values()) < 0 and len(response.split()) > _LONG_RESPONSE:
        text = response.lower()
        places = {letter: text.rfind(option.lower()) for letter, option in options.items()}
    best = max(places, key=lambda letter: places[letter])
    return best if places[best] >= 0 else None


def parse_multi_choice(response: str, options: Mapping[str, str], rng: random.Random) -> str:
    """The option a response chooses, or a random one.

    Args:
      response: The generated text.
      options: Letter -> text.
      rng: Draws once for every response without an option; `random.Random(SEED)` for a whole run.
    """
    return find_option(response, options) or rng.choice(list(options))


def normalize(text: str) -> list[str | float]:
    """A number rounded to two digits, or lower-case text; a single character twice, padded.

    >>> normalize("1,234.567"), normalize("B")
    ([1234.57], [' b', 'b '])
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    # A bare letter would be found in nearly any text.
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(response: str) -> list[str]:
    """Per line the shortest text after an indicator word; the whole response if there is none."""
    response = response.strip().strip(".").lower()
    lines, found = response.split("\n"), []
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        shortest = ""
        for indicator in (*_INDICATORS, "=") if last else _INDICATORS:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [response]


def parse_open(response: str) -> set[str | float]:
    """Candidate answers in an open response: key phrases and the numbers in them, normalised.

    >>> 7.0 in parse_open("So the answer is 7.")
    True
    """
    phrases = _key_phrases(response)
    numbers = [n for phrase in phrases for pattern in _NUMBERS for n in pattern.findall(phrase)]
    return {value for text in phrases + numbers for value in normalize(text)}


def is_open_correct(candidates: set[str | float], answer: str | Sequence[str]) -> bool:
    """Whether a true answer is contained in a candidate text or equals a candidate number.

    >>> is_open_correct(parse_open("It is 7."), ["7", "seven"])
    True
    """
    answers = [answer] if isinstance(answer, str) else answer
    truths = [value for text in answers for value in normalize(text)]
    return any(
        any(isinstance(truth, str) and truth in candidate for truth in truths)
        if isinstance(candidate, str)
        else candidate in truths
        for candidate in candidates
    )


def subject_of(item_id: str) -> str:
    """`Art_Theory` of `validation_Art_Theory_7`."""
    return item_id.partition("_")[2].rpartition("_")[0]


def mmmu_summary(hits: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Accuracies as fractions over questions: for every subject, every domain, and `Overall`.

    >>> mmmu_summary({"Math": [True, False]})["Science"]
    0.5

    Args:
      hits: Subject -> for every question whether its answer is right.

    Raises:
      UserError: A subject is unknown or has no questions.
    """
    known = [subject for subjects in DOMAINS.values() for subject in subjects]
    for subject, values in hits.items():
        if subject not in known:
            raise choice_error("MMMU subject", subject, known)
        if not values:
            raise UserError(f"MMMU subject {subject} has no questions")
    groups = {subject: list(values) for subject, values in hits.items()}
    for domain, subjects in DOMAINS.items():
        groups[domain] = [value for subject in subjects for value in hits.get(subject, ())]
    groups["Overall"] = [value for values in hits.values() for value in values]
    return {name: sum(values) / len(values) for name, values in groups.items() if values}
