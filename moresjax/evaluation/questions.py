"""Questions of one's own: a JSON list, or JSON Lines, with one record per question.

| field | what it is |
|---|---|
| `id` or `question_id` | the question's name in predictions; default: the record's number, from 0 |
| `image` or `images` | a path below the image root, a `data:` URL, or a list; none for text alone |
| `question` or `text` | what is asked, word for word; a single image comes before it |
| `answer` | the answer; a list holds alternatives, any of which is right |
| `answers` | the answers of several people, scored by VQA accuracy |
| `choices` | the texts of options, which are asked with letters |
| `group` or `category` | a name: the score is also given for each group |
| `max_new_tokens` | the length limit of this answer; default: 128 |
| `roi` | a box (x0, y0, x1, y1) of the image in shares of its sides, or a list of boxes |
| `marks` | pieces of the question by name, for tunings that act on `mark(NAME)` |

Exact match compares as LLaVA's evaluation of GQA does: case, blanks around the text and a final
period do not count. VQA accuracy is that of the challenge's tool (`people_accuracy`). A choice is
right if its letter is said, or its text. Scores are means, so a file may hold all three kinds.
"""

import dataclasses
import logging
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.data.records import JsonRecords
from moresjax.data.regions import find_regions
from moresjax.data.samples import IMAGE_MARK, Turn, moved_marks
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    LETTERS,
    PICK_LETTER,
    SavedPredictions,
    image_file,
    load_results,
    result_reader,
    with_options,
)
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.vqa import normalize_gqa, people_accuracy
from moresjax.evaluation.scoring import Predictions, TaskScore
from moresjax.evaluation.statistics import clustered_stderr, image_clusters, interval
from moresjax.evaluation.tasks import BenchmarkTask

EXACT, PEOPLE, CHOICE = "exact match", "VQA accuracy", "multiple choice"
MIN_PEOPLE = 4  # with fewer answers not even the right one can reach 1
FIELDS = (
    *("id", "question_id", "image", "images", "question", "text"),
    *("answer", "answers", "choices", "group", "category", "max_new_tokens", "roi", "marks"),
)
_UPPER = re.compile(r"\(?([A-H])(?:[).:,]|$)")
_LOWER = re.compile(r"\(?([a-h])\)?\.?$")
_SENTENCE = re.compile(r"(?i:answer is):?\s+\(?([A-H])(?:[).:,]|$)")


def load_questions(
    path: str | Path, *, image_root: str | Path | None = None, limit: int | None = None
) -> BenchmarkTask:
    r"""The task of a file of questions, named like the file.

    >>> import json, tempfile
    >>> file = Path(tempfile.mkdtemp(), "colours.jsonl")
    >>> record = {"image": "snow.jpg", "question": "What colour is it?", "answer": "white"}
    >>> _ = file.write_text(json.dumps(record))
    >>> task = load_questions(file)
    >>> task.name, task.examples[0].prompt
    ('colours', '<image>\nWhat colour is it?')

    Args:
      path: The file: a JSON list, an object with one under `data` or `questions`, or JSON Lines.
      image_root: The folder that image paths start from; default: that of the file.
      limit: The number of questions to keep, the first ones.

    Raises:
      UserError: The file or the folder does not exist, or a record is wrong: which, and how.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise UserError(f"image root {root} is not a folder")
    examples, unread, numbers = [], Counter(), {}
    records = JsonRecords.scan(path)
    for number in range(len(records))[:limit]:
        record = records[number]
        where = f"record {number} of {path}"
        example = _example(record, number, where, root)
        if example.id in numbers:
            raise UserError(f"{where} has the id {example.id!r} of record {numbers[example.id]}")
        numbers[example.id] = number
        examples.append(example)
        unread.update(key for key in record if key not in FIELDS)
    if unread:
        names = ", ".join(unread)
        logging.getLogger(__name__).warning(f"{path}: fields that are not read: {names}")
    return BenchmarkTask(path.stem, examples, scorer=score_questions, read=_read_saved)


def _example(record: Any, number: int, where: str, root: Path) -> Example:
    """The question of a record."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where} must be an object, not {type(record).__name__}")
    if "conversations" in record or "messages" in record:
        raise UserError(
            f"{where} is a conversation to train on; a question has the fields `question` and "
            "`answer`"
        )
    name = _text(record.get("id", record.get("question_id", number)), "id", where)
    names = _images(record, where)
    question = record.get("question", record.get("text"))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where} has no question; it is a text under `question` or `text`")
    images = tuple(image_file(root, image, name) for image in names)
    choices = _choices(record, where)
    kind, answer = _answer(record, choices, where)
    record_question = question
    if choices:
        question = f"{with_options(question, choices)}\n{PICK_LETTER}"
    metadata = {"kind": kind, "choices": choices}
    group = record.get("group", record.get("category"))
    if group is not None:
        metadata["group"] = _text(group, "group", where)
    prompt, limit = _prompt(question, len(names), where), record.get("max_new_tokens")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"{where}: max_new_tokens must be a whole number above 0, got {limit!r}")
    marks = moved_marks(record.get("marks"), [record_question], [Turn(prompt)], where)
    pointed = {
        "roi": find_regions(record.get("roi"), len(names), where),
        "marks": marks or None,
    }
    options = {"metadata": metadata, "max_new_tokens": limit} | pointed
    return Example(name, prompt, answer, images, **options)


def _answer(record: Mapping, choices: Sequence[str], where: str) -> tuple[str, Any]:
    """The kind of a question, and its answer; None without one."""
    if record.get("answer") is not None and record.get("answers") is not None:
        raise UserError(f"{where} has both `answer` and `answers`; give one of them")
    if choices:
        return CHOICE, _letter(record, choices, where)
    if record.get("answers") is not None:
        answers = _texts(record["answers"], "answers", where)
        if len(answers) == 1:
            return EXACT, answers[0]
        if len(answers) < MIN_PEOPLE:
            raise UserError(
                f"{where} has the answers of {len(answers)} people, and VQA accuracy needs "
                f"{MIN_PEOPLE} at least; a list under `answer` holds alternatives"
            )
        return PEOPLE, answers
    answer = record.get("answer")
    if isinstance(answer, list):
        return EXACT, _texts(answer, "answer", where)
    return EXACT, None if answer is None else _text(answer, "answer", where)


def _images(record: Mapping, where: str) -> tuple[str, ...]:
    if record.get("image") and record.get("images"):
        raise UserError(f"{where} has both `image` and `images`; give one of them")
    value = record.get("image") or record.get("images") or ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: image {value!r} is neither a path nor a list of paths")
    return tuple(names)


def _prompt(question: str, images: int, where: str) -> str:
    """The question with a mark for every image; where it has none, they come first."""
    marks = question.count(IMAGE_MARK)
    if marks not in (0, images):
        raise UserError(f"{where}: the question has {marks} {IMAGE_MARK} for {images} images")
    if marks <= 1:  # as in training data
        question = question.replace(IMAGE_MARK, "").strip()
        return "\n".join([*[IMAGE_MARK] * images, question])
    return question


def _choices(record: Mapping, where: str) -> tuple[str, ...]:
    if not record.get("choices"):
        return ()
    choices = _texts(record["choices"], "choices", where)
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where} has {len(choices)} choices; there may be 2 to {len(LETTERS)}")
    if len({normalize_gqa(choice) for choice in choices}) < len(choices):
        raise UserError(f"{where} has two choices that are alike: {', '.join(choices)}")
    return tuple(choices)


def _letter(record: Mapping, choices: Sequence[str], where: str) -> str | None:
    """The letter of the right choice, which is given as a letter, as its text, or as its number."""
    value = record.get("answer", record.get("answers"))
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if value is None:
        return None
    text = _text(value, "answer", where)
    letters = LETTERS[: len(choices)]
    same = (normalize_gqa(choice) == normalize_gqa(text) for choice in choices)
    found = {letter for letter, is_same in zip(letters, same, strict=True) if is_same}
    if text.strip() and text.strip().upper() in letters and len(text.strip()) == 1:
        found.add(text.strip().upper())
    if isinstance(value, int) and 0 <= value < len(choices):
        found.add(letters[value])
    if len(found) != 1:
        what = "may be several of" if found else "is none of"
        raise UserError(f"{where}: the answer {value!r} {what} the choices {', '.join(choices)}")
    return found.pop()


def _text(value: Any, field: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {field} must be a text or a number, got {value!r}")
    return str(value)


def _texts(values: Any, field: str, where: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {field} must be a list of texts, got {values!r}")
    # The official files of VQA have objects here.
    plain = [v.get("answer") if isinstance(v, Mapping) else v for v in values]
    return [_text(value, field, where) for value in plain]


def _read_saved(path: Path) -> SavedPredictions:
    """Answers by id: rows with `id` and `prediction`, or LLaVA's with `question_id` and `text`."""
    data = load_results(path)
    first = data[0] if isinstance(data, list) and data else data
    llava = isinstance(first, Mapping) and {"question_id", "text"} <= set(first)
    return result_reader(*(("question_id", "text") if llava else ("id", "prediction")))(path)


def chosen_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names; None where it names none.

    >>> chosen_letter("(B) tea", ["salt", "tea"]), chosen_letter("Tea.", ["salt", "tea"])
    ('B', 'B')
    >>> chosen_letter("A cup", ["salt", "tea"]) is None
    True

    Args:
      text: The answer: a choice's text, a letter alone or before one of `).:,`, or a sentence with
        "the answer is" before the letter.
      choices: The texts of the choices.
    """
    letters, said = LETTERS[: len(choices)], text.strip()
    for letter, choice in zip(letters, choices, strict=True):
        if normalize_gqa(choice) == normalize_gqa(said):
            return letter
    found = _UPPER.match(said) or _LOWER.match(said) or _SENTENCE.search(said)
    letter = found.group(1).upper() if found else ""
    return letter if letter and letter in letters else None


def score_answer(prediction: str, example: Example) -> float:
    """The score of one answer, from 0 to 1.

    Args:
      prediction: What the model says.
      example: The question of a file, with its kind in the metadata.
    """
    if example.metadata["kind"] == CHOICE:
        return float(chosen_letter(prediction, example.metadata["choices"]) == example.answer)
    if example.metadata["kind"] == PEOPLE:
        return people_accuracy(prediction, example.answer)
    return float(normalize_gqa(prediction) in map(normalize_gqa, _accepted(example)))


def _accepted(example: Example) -> list[str]:
    return example.answer if isinstance(example.answer, list) else [example.answer]


def majority_accuracy(examples: Sequence[Example]) -> float:
    """The score of always giving the most frequent answer; one answer for each kind of question.

    Args:
      examples: Questions of a file, all with an answer.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        kind, texts = example.metadata["kind"], _accepted(example)
        # Alternatives of one question count once; people count each.
        counts[kind].update({normalize_gqa(x): 1 for x in texts} if kind == EXACT else texts)
    guesses = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return statistics.fmean(score_answer(guesses[e.metadata["kind"]], e) for e in examples)


@dataclasses.dataclass(frozen=True)
class _Group:
    examples: list[Example] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """Score, interval and baseline, as they are in results."""
        clusters, mean = image_clusters(self.examples), statistics.fmean(self.scores)
        count, error = len(set(clusters)), clustered_stderr(self.scores, clusters)
        bounds = None if error is None else [*interval(mean, error, count, share=True)]
        return {
            "score": mean,
            "stderr": error,
            "interval95": bounds,
            "n": len(self.scores),
            "clusters": count,
            "majority": majority_accuracy(self.examples),
        }


def score_questions(
    examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
) -> TaskScore:
    """The mean score, with the majority baseline and the groups' scores in the details.

    Where a question has no answer nothing is scored, and `without_answer` says how many have none.
    """
    kinds = {example.metadata["kind"] for example in examples}
    metric = kinds.pop() if len(kinds) == 1 else "accuracy"
    unknown = sum(example.answer is None for example in examples)
    if unknown:
        return TaskScore(metric, details={"without_answer": unknown})
    scores = [
        0.0 if text is None else score_answer(text, example)
        for example, text in zip(examples, predictions, strict=True)
    ]
    details: dict[str, Any] = {"majority": majority_accuracy(examples)}
    groups: dict[str, _Group] = defaultdict(_Group)
    if any("group" in example.metadata for example in examples):
        for example, score in zip(examples, scores, strict=True):
            group = groups[example.metadata.get("group", "(none)")]
            group.examples.append(example)
            group.scores.append(score)
        details["groups"] = {name: group.numbers() for name, group in groups.items()}
    return TaskScore(metric, scores, details)
