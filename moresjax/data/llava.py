"""LLaVA's conversation files: pretraining captions (558k), the instruction mix (665k), task files.

A record is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`; `image`
(or `images`) is a path below the image root, a list of them, or left out for text alone. OpenAI's
names are read too: `messages`, `role`, `content`, `user` and `assistant`, and a `content` that is a
list of parts of the types `text`, `image` and `image_url`. Where a path stands, a `data:` URL may
stand. A first turn may be the system prompt. `roi` has boxes of the images (see `find_regions`) and
`marks` names pieces of the questions (see `find_marks`).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.data.images import named_image
from moresjax.data.records import JsonRecords
from moresjax.data.regions import EVERYWHERE, Box, Regions, find_regions
from moresjax.data.samples import (
    EARLY_TURNS,
    IMAGE_MARK,
    Mark,
    Sample,
    Turn,
    move_marks,
    moved_marks,
)

ROLES = ("human", "gpt")
# How the turns of a conversation are read: as its rounds, or each by itself on the shared image.
TURNS = ("dialogue", "independent")
_IMAGES_FIRST = re.compile(rf"(\s*{IMAGE_MARK})+")
OTHER_ROLES = {"user": "human", "assistant": "gpt"}  # as OpenAI's format and others name them


def image_names(record: Any, name: str) -> tuple[str, ...]:
    """The images of a record, as it names them.

    Raises:
      UserError: `image` is neither text nor a list of texts, or images are also named in `content`.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"sample {name}: a record must be an object, not {type(record).__name__}")
    if not any(_says_nothing(record.get(key)) for key in ("image", "images")):
        raise UserError(f"sample {name}: it has both `image` and `images`; give one of them")
    value = _images(record)
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(item, str) for item in names):
        raise UserError(f"sample {name}: image {value!r} is neither a path nor a list of paths")
    rounds = _rounds(record)
    contents = [_content(item) for item in rounds] if _is_list(rounds) else []
    lists = [content for content in contents if isinstance(content, list)]
    inside = [image for parts in lists for part in parts if (image := _part(part, name)[1])]
    if inside and names:
        raise UserError(f"sample {name}: images are named both beside the conversation and in it")
    return tuple(inside or names)


def to_sample(record: Any, name: str, images: Sequence[Any], *, prompt: bool = False) -> Sample:
    """A record as a conversation about `images`.

    LLaVA's rules hold: a question's single image comes first wherever its mark stands, on a line of
    its own, and answers before the first question are left out. Several images of one question stay
    where their marks are.

    Args:
      record: An object with `conversations` or `messages`.
      name: The name of the sample.
      images: The images in the order of their marks.
      prompt: Whether the conversation ends with a question, which is to be answered.

    Raises:
      UserError: The conversation is empty, its roles do not take turns, a value is not text, an
        answer has an image, or marks and images are not equally many.
    """
    if not {"conversations", "messages"} & set(record):
        raise UserError(f"sample {name}: {_foreign(record)}")
    rounds = _rounds(record)
    if not _is_list(rounds) or not rounds:
        raise UserError(f"sample {name}: the conversation is empty")
    texts = [_text(item, name) for item in rounds]
    roles = [_role(item) for item in rounds]
    system = None
    if roles[0] == "system":
        (system, *texts), roles = texts, roles[1:]
        if IMAGE_MARK in system:
            raise UserError(f"sample {name}: the system prompt contains {IMAGE_MARK}")
        if not texts:
            raise UserError(f"sample {name}: the conversation is empty")
    first = roles.index("human") if "human" in roles else 0
    own = [*roles[first:], *(["gpt"] if prompt else [])]
    if len(own) % 2 or own != [*ROLES] * (len(own) // 2):
        ending = " and end with human" if prompt else ""
        raise UserError(
            f"sample {name}: roles must be human and gpt in turn{ending}, got "
            f"{', '.join(map(str, roles))}"
        )
    questions, answers = texts[first::2], texts[first + 1 :: 2]
    if any(IMAGE_MARK in answer for answer in answers):
        raise UserError(f"sample {name}: an answer contains {IMAGE_MARK}")
    marks = sum(question.count(IMAGE_MARK) for question in questions)
    if marks != len(images):
        raise UserError(
            f"sample {name}: the text has {marks} {IMAGE_MARK} but {len(images)} images are given"
        )
    pairs = itertools.zip_longest(questions, answers)  # a prompt's last question has no answer
    turns = (Turn(_image_first(question), answer) for question, answer in pairs)
    cut = f"{EARLY_TURNS} are left out: {first}" if first else ""
    system_text = system if system and system.strip() else None
    sample = Sample(name, tuple(turns), tuple(images), system=system_text, cut=cut)
    return _with_regions_and_marks(sample, record, questions)


def _with_regions_and_marks(
    sample: Sample, record: Mapping[str, Any], questions: Sequence[str]
) -> Sample:
    """The sample with what `roi` and `marks` of its record say, whose questions were these."""
    roi, marks = record.get("roi"), record.get("marks")
    if roi is None and not marks:
        return sample
    name = f"sample {sample.id}"
    regions = find_regions(roi, len(sample.images), name)
    moved = moved_marks(marks, questions, sample.turns, name)
    return dataclasses.replace(sample, roi=regions, marks=moved)


def has_rounds(record: Any) -> bool:
    """Whether a record is a conversation, well-formed or not."""
    return isinstance(record, Mapping) and _rounds(record) is not None


def independent_turns(sample: Sample) -> Sample:
    r"""The questions of a conversation about images, each asked by itself after the images.

    Conversations without an image stay as they are: their turns share nothing but what was said.

    >>> turns = Turn("<image>\nWho?", "Ann"), Turn("Where?", "Here")
    >>> alone = independent_turns(Sample("1", turns, ("a.png",)))
    >>> [alone.context + turn.question for turn in alone.turns]
    ['<image>\nWho?', '<image>\nWhere?']

    Raises:
      UserError: The images do not all stand before the text of the first question.
    """
    if not sample.images or len(sample.turns) == 1:
        return sample
    first = sample.turns[0].question or ""
    found = _IMAGES_FIRST.match(first)
    if found is None or found.group().count(IMAGE_MARK) != len(sample.images):
        raise UserError(
            f"sample {sample.id}: turns=independent needs all {IMAGE_MARK} before the text of the "
            "first question"
        )
    text = first[found.end() :]
    gap = text[: len(text) - len(text.lstrip())] or "\n"
    questions = [text, *(turn.question or "" for turn in sample.turns[1:])]
    asked = (gap + question.strip() if question.strip() else "" for question in questions)
    pairs = zip(sample.turns, asked, strict=True)
    turns = tuple(dataclasses.replace(turn, question=question) for turn, question in pairs)
    marks, context = move_marks(sample.marks, sample.turns, turns), found.group().lstrip()
    changes = {"turns": turns, "context": context, "independent": True, "marks": marks}
    return dataclasses.replace(sample, **changes)


def is_independent(turns: str) -> bool:
    """Whether the turns of a conversation are read as independent questions.

    Raises:
      UserError: The choice is unknown.
    """
    if turns not in TURNS:
        raise choice_error("turns", turns, TURNS)
    return turns == "independent"


def _rounds(record: Mapping[str, Any]) -> Any:
    return record["conversations"] if "conversations" in record else record.get("messages")


def _images(record: Mapping[str, Any]) -> Any:
    given = (record.get(key) for key in ("image", "images"))
    return next((value for value in given if not _says_nothing(value)), ())


def _says_nothing(value: Any) -> bool:
    """Whether what stands for an image means that there is none; `false` and `0` do not."""
    return value is None or (isinstance(value, str | list) and not value)


def _foreign(record: Mapping[str, Any]) -> str:
    """What a record is that holds no conversation."""
    if {"question", "text"} & set(record):
        return (
            "it is a question without a conversation; files of questions are for `evaluate --tasks`"
            " and `generate --prompts`, and a sample to train on has `conversations`"
        )
    return f"it has neither `conversations` nor `messages`, but {', '.join(record) or 'nothing'}"


def _role(item: Mapping[str, Any]) -> Any:
    role = item.get("from", item.get("role"))
    return OTHER_ROLES.get(role, role) if isinstance(role, str) else role


def to_record(
    name: str,
    turns: Sequence[Turn],
    images: Sequence[str],
    system: str | None = None,
    roi: Regions = (),
    marks: Sequence[Mark] = (),
) -> dict[str, Any]:
    r"""A conversation as a record of LLaVA, which `to_sample` reads.

    >>> to_record("cat", [Turn("<image>\nwho ?", "me")], ["cat.jpg"])["conversations"][1]
    {'from': 'gpt', 'value': 'me'}

    Args:
      name: The record's id.
      turns: Questions and answers, with a mark for every image.
      images: The paths of the images, from the image root.
      system: The system prompt.
      roi: The boxes of every image.
      marks: Named pieces of the questions.
    """
    rounds = [("system", system)] if system else []
    for turn in turns:
        answer = (turn.answer or "").replace(IMAGE_MARK, "")  # an answer shows no image
        rounds += [("human", turn.question), ("gpt", answer)]
    record: dict[str, Any] = {"id": name}
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    if any(boxes is not None for boxes in roi):
        record["roi"] = [None if own is None else [*map(_written, own)] for own in roi]
    for mark in marks:
        named = record.setdefault("marks", {}).setdefault(mark.name, [])
        named.append([mark.turn, mark.start, mark.end])
    return record | {"conversations": [{"from": role, "value": text} for role, text in rounds]}


def _written(box: Box) -> list[float]:
    """A box as a file has it; of all visual tokens it says the whole image."""
    return [0.0, 0.0, 1.0, 1.0] if box == EVERYWHERE else list(box)


def _is_list(rounds: Any) -> bool:
    return isinstance(rounds, Sequence) and not isinstance(rounds, str)


def _content(item: Any) -> Any:
    # JSON has dictionaries, which are told at once; a test for any mapping takes longer.
    known = isinstance(item, dict | Mapping)
    return item.get("value", item.get("content")) if known else None


def _text(item: Any, name: str) -> str:
    """The text of a turn, with a mark for every image among its parts."""
    content = _content(item)
    if isinstance(content, list) and content:
        return "\n".join(_part(part, name)[0] for part in content)
    if not isinstance(content, str):
        raise UserError(f"sample {name}: a turn of the conversation has no text")
    return content


def _part(part: Any, name: str) -> tuple[str, str]:
    """The text of a part of a turn, and the image that it names.

    A part `{"type": "image"}` alone stands for the record's next image.
    """
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return fields["text"], ""
    if kind in ("image", "image_url"):
        given = [fields[key] for key in ("image", "image_url", "url", "path") if key in fields]
        image = given[0] if given else "" if kind == "image" else None
        image = image.get("url") if isinstance(image, Mapping) else image
        if isinstance(image, str):
            return IMAGE_MARK, image
    raise UserError(
        f"sample {name}: a part of a turn must be a text, an image or an image_url with its "
        f"content, got {str(part)[:80]}"
    )


def _image_first(question: str) -> str:
    if question.count(IMAGE_MARK) != 1:
        return question
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}".strip()


def measure(record: Any) -> tuple[int, int, int, int]:
    """Words, images, turns before the first question, and questions of a record.

    It is not checked. Samples are grouped by words and images; what is left out of them is counted
    from the rest.
    """
    try:
        rounds = _rounds(record)
        words = sum(len(_text(item, "").split()) for item in rounds)
        roles = [role for item in rounds if (role := _role(item)) != "system"]
        first = roles.index("human") if "human" in roles else 0
        return words, len(image_names(record, "")), first, roles.count("human")
    except (TypeError, AttributeError, UserError):
        return 0, 0, 0, 0  # whoever asks for the sample is told what is wrong with it


@dataclasses.dataclass(frozen=True)
class LlavaSource:
    """Samples of one or several files; only an index of them is held in memory.

    Attributes:
      files: The paths of JSON or JSON Lines files, joined by `;`.
      image_root: The folder that image paths start from.
      weights: One number per file, joined by `;`: how much is read from each. Empty: every sample
        once per epoch.
      turns: `dialogue`, or `independent`: each question of a conversation by itself on the shared
        images.
    """

    files: str
    image_root: str = "."
    weights: str = ""
    turns: str = "dialogue"
    branches: ClassVar[bool] = False  # of a source of dialogues

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", is_independent(self.turns))
        if not Path(self.image_root).is_dir():
            raise UserError(f"image_root {self.image_root} is not a folder")
        if self.weights and len(self._weights) != len(self.files.split(";")):
            raise UserError(
                f"data weights {self.weights!r} must be as many as the files {self.files!r}"
            )
        if not all(weight > 0 for weight in self._weights):
            raise UserError(f"data weights {self.weights!r} must be positive")
        _ = self.records

    @functools.cached_property
    def _weights(self) -> tuple[float, ...]:
        try:
            return tuple(float(weight) for weight in self.weights.split(";") if weight)
        except ValueError:
            raise UserError(f"data weights {self.weights!r} are not numbers") from None

    @functools.cached_property
    def records(self) -> tuple[JsonRecords, ...]:
        """The files, indexed."""
        return tuple(JsonRecords.scan(path, measure) for path in self.files.split(";"))

    @functools.cached_property
    def _borders(self) -> np.ndarray:
        return np.cumsum([len(records) for records in self.records])

    @property
    def mixture_weights(self) -> tuple[tuple[slice, float], ...]:
        """The indices and the weight of every file; empty without weights."""
        starts = [0, *self._borders[:-1]]
        files = [slice(int(a), int(b)) for a, b in zip(starts, self._borders, strict=True)]
        return tuple(zip(files, self._weights, strict=True)) if self._weights else ()

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """The words and images of every sample."""
        return np.concatenate([records.sizes[:, :2] for records in self.records])

    @property
    def turn_counts(self) -> Int[np.ndarray, "n 2"]:
        """The turns before the first question, which are left out, and all questions."""
        return np.concatenate([records.sizes[:, 2:] for records in self.records])

    def __len__(self) -> int:
        return int(self._borders[-1])

    def record(self, index: int) -> tuple[Any, str]:
        """A record as it is in the file, and the name of its sample.

        Ids of the mix are not unique, so the name also says which record of which file it is.
        """
        file = int(np.searchsorted(self._borders, index, side="right"))
        number = int(index - (self._borders[file - 1] if file else 0))
        record = self.records[file][number]
        name = f"{self.records[file].path.name}[{number}]"
        own = record.get("id") if isinstance(record, Mapping) else None
        return record, name if own is None else f"{name} {own}"

    def named_images(self, names: Sequence[str], name: str) -> list[Path | bytes]:
        """Paths, or bytes of `data:` URLs, of the images of the sample `name`.

        Raises:
          UserError: A path leaves the image root, or a URL cannot be used.
        """
        return [named_image(self.image_root, image, f"sample {name}") for image in names]

    def __getitem__(self, index: int) -> Sample:
        record, name = self.record(index)
        names = image_names(record, name)
        sample = to_sample(record, name, self.named_images(names, name))
        return independent_turns(sample) if self.branches else sample
