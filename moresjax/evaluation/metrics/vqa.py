"""Open answers to questions about images: VQA soft accuracy in its two variants, and GQA.

Ten people answered every question; a prediction scores by how many of them it agrees with.

- `vqa_accuracy`: the VQA challenge's evaluation tool (Antol et al. 2015, `GT-Vision-Lab/VQA`), for
  VQAv2, OKVQA and VizWiz. Answers stay as they are where all ten people agree.
- `m4c_accuracy`: Pythia/M4C's evaluator, which LLaVA uses for TextVQA. Answers are always
  normalised, and more strictly.
- `gqa_accuracy`: exact match after LLaVA's clean-up (`GQA`, Hudson & Manning 2019).
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from moresjax.core.errors import UserError

ANNOTATORS = 10

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


def plain_words(text: str) -> str:
    """Lower case, number words to ten as digits, no articles, apostrophes put back."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_vqa(text: str) -> str:
    """An answer as the VQA tool compares it where people disagree."""
    return plain_words(_strip_punctuation(_trim(text)))


def normalize_m4c(text: str) -> str:
    """An answer as the M4C evaluator compares it; also what goes into VQA submission files."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(_strip_punctuation(_trim(text)))


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of `min(1, matches among the other nine / 3)`."""
    matches = sum(answer == prediction for answer in answers)
    others = (matches - (answer == prediction) for answer in answers)
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def _check_answers(answers: Sequence[str]) -> None:
    if len(answers) != ANNOTATORS:
        raise UserError(f"VQA accuracy needs {ANNOTATORS} answers per question, got {len(answers)}")


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one question: 0, 0.3, 0.6, 0.9 or 1.

    Args:
      prediction: the model's answer.
      answers: of the ten annotators.

    Raises:
      UserError: unless there are ten answers.
    """
    _check_answers(answers)
    prediction, answers = _trim(prediction), [_trim(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_vqa(prediction), [normalize_vqa(a) for a in answers]
    return _leave_one_out(prediction, answers)


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA accuracy of one question: as `vqa_accuracy`, but everything is always normalised.

    Raises:
      UserError: unless there are ten answers.
    """
    _check_answers(answers)
    return _leave_one_out(normalize_m4c(prediction), [normalize_m4c(a) for a in answers])


def vqa_summary(
    scores: Sequence[float],
    question_types: Sequence[str] = (),
    answer_types: Sequence[str] = (),
) -> dict[str, float | dict[str, float]]:
    """Percentages with two digits: `overall`, `perQuestionType`, `perAnswerType`.

    Args:
      scores: of the questions, in 0..1.
      question_types: of the questions, or nothing.
      answer_types: likewise (`yes/no`, `number`, `other`).

    Raises:
      UserError: without scores.
    """
    if not scores:
        raise UserError("VQA accuracy needs at least one question, got none")

    def by(kinds: Sequence[str]) -> dict[str, float]:
        groups = defaultdict(list)
        for score, kind in zip(scores, kinds, strict=bool(kinds)):
            groups[kind].append(score)
        return {kind: _percent(values) for kind, values in groups.items()}

    return {
        "overall": _percent(scores),
        "perQuestionType": by(question_types),
        "perAnswerType": by(answer_types),
    }


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 2)


def normalize_gqa(text: str) -> str:
    """LLaVA's clean-up of a GQA prediction: no final period, lower case."""
    return text.strip().rstrip(".").lower()


def gqa_accuracy(prediction: str, answer: str) -> float:
    """1 if the cleaned prediction is the answer."""
    return float(normalize_gqa(prediction) == answer)
