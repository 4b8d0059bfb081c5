"""Open answers to questions about images: VQA soft accuracy in its two variants, and GQA.

Ten people answered every question; a prediction scores by how many of them it agrees with.

- `vqa_accuracy`: the VQA challenge's evaluation tool (Antol et al. 2015, `GT-Vision-Lab/VQA`), for
  VQAv2, OKVQA and VizWiz. Answers stay as they are where all ten people agree.
- `m4c_accuracy`: Pythia/M4C's evaluator, which LLaVA uses for TextVQA. Answers are always
  normalised, and more strictly.
- `gqa_accuracy`: exact match after LLaVA's clean-up (`GQA`, Hudson & Manning 2019).
"""

import re
from collections.abc import Sequence

from moresjax.core.errors import UserError

_ANNOTATORS = 10

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The tools mean to keep the period after a digit too, but their look-behind is mistyped.
_PERIOD = re.compile(r"\.(?!\d)")
# They also pass a flag where the largest number of replacements belongs.
_MAX_PERIODS = int(re.UNICODE)

_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""


def _contractions() -> dict[str, str]:
    """The tools' table: every contraction with one apostrophe forgotten, and one oddity."""
    table = {
        word[:i] + word[i + 1 :]: word
        for word in _CONTRACTED.split()
        for i, character in enumerate(word)
        if character == "'"
    }
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """Deletes a mark that touches a blank, turns it into a blank otherwise; then the periods."""
    has_number_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches or has_number_comma else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def _plain_words(text: str) -> str:
    """Lower case, number words to ten as digits, no articles, apostrophes put back."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_vqa(text: str) -> str:
    """An answer as the VQA tool compares it where people disagree.

    >>> normalize_vqa("The two dogs, left")
    '2 dogs left'
    """
    return _plain_words(_strip_punctuation(_trim(text)))


def normalize_m4c(text: str) -> str:
    """An answer as the M4C evaluator compares it; also what goes into VQA submission files.

    >>> normalize_m4c("The two dogs.")
    '2 dogs'
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_strip_punctuation(_trim(text)))


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of `min(1, matches among the other nine / 3)`."""
    matches = sum(answer == prediction for answer in answers)
    others = (matches - (answer == prediction) for answer in answers)
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def _check_answers(answers: Sequence[str]) -> None:
    if len(answers) != _ANNOTATORS:
        raise UserError(
            f"VQA accuracy needs {_ANNOTATORS} answers per question, got {len(answers)}"
        )


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one question: 0, 0.3, 0.6, 0.9 or 1.

    >>> round(vqa_accuracy("blue", ["red"] * 8 + ["blue"] * 2), 2)
    0.6

    Args:
      prediction: The model's answer.
      answers: The answers of the ten annotators.

    Raises:
      UserError: There are not ten answers.
    """
    _check_answers(answers)
    return people_accuracy(prediction, answers)


def people_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy for any number of people, as the official tool computes it.

    >>> people_accuracy("blue", ["blue"] * 4), people_accuracy("red", ["blue"] * 4)
    (1.0, 0.0)

    Args:
      prediction: The model's answer.
      answers: The answers of at least four people; of fewer, none can reach 1.
    """
    prediction, answers = _trim(prediction), [_trim(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_vqa(prediction), [normalize_vqa(a) for a in answers]
    return _leave_one_out(prediction, answers)


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA accuracy of one question, in which all answers are always normalised.

    >>> m4c_accuracy("Stop.", ["stop"] * 9 + ["halt"])
    1.0

    Args:
      prediction: The model's answer.
      answers: The answers of the ten annotators.

    Raises:
      UserError: There are not ten answers.
    """
    _check_answers(answers)
    return _leave_one_out(normalize_m4c(prediction), [normalize_m4c(a) for a in answers])


def normalize_gqa(text: str) -> str:
    """LLaVA's clean-up of a GQA prediction: no final period, lower case.

    >>> normalize_gqa(" Left.")
    'left'
    """
    return text.strip().rstrip(".").lower()


def gqa_accuracy(prediction: str, answer: str) -> float:
    """1 if the cleaned prediction is the answer, else 0."""
    return float(normalize_gqa(prediction) == answer)


def matches_of_three(prediction: str, answers: Sequence[str]) -> float:
    """`min(1, matches / 3)` with everything normalised: VQA accuracy without leaving one out.

    Source: the accuracy that "Analyzing Fine-tuning Representation Shift for Multimodal LLMs
    Steering" reports.

    >>> matches_of_three("Blue.", ["red"] * 8 + ["blue"] * 2) == 2 / 3
    True

    Args:
      prediction: The model's answer.
      answers: The answers of the annotators.
    """
    said = normalize_vqa(prediction)
    return min(1.0, sum(normalize_vqa(answer) == said for answer in answers) / 3)
