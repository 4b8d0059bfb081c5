"""LLaVA's conversation files: pretraining captions (558k), the instruction mix (665k), task files.

A record is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`; `image`
(or `images`) is a path below the image root, a list of them, or left out for text alone. OpenAI's
names are read too: `messages`, `role`, `content`, `user` and `assistant`. A first turn may be the
system prompt.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.data.images import image_path
from moresjax.data.records import JsonRecords
from moresjax.data.samples import IMAGE_MARK, Sample, Turn

ROLES = ("human", "gpt")
# How the turns of a conversation are read: as its rounds, or each by itself on the shared image.
TURNS = ("dialogue", "independent")
_IMAGES_FIRST = re.compile(rf"(\s*{IMAGE_MARK})+")
OTHER_ROLES = {"user": "human", "assistant": "gpt"}  # as OpenAI's format and others name them


def image_names(record: Any, name: str) -> tuple[str, ...]:
    """The images of a record, as it names them.

    Raises:
      UserError: `image` is neither text nor a list of texts.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"sample {name}: a record must be an object, not {type(record).__name__}")
    if record.get("image") and record.get("images"):
        raise UserError(f"sample {name}: it has both `image` and `images`; give one of them")
    value = _images(record)
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(item, str) for item in names):
        raise UserError(f"sample {name}: image {value!r} is neither a path nor a list of paths")
    return tuple(names)


def to_sample(record: Any, name: str, images: Sequence[Any]) -> Sample:
    """A record as a conversation about `images`.

    LLaVA's rules hold: a question's single image comes first wherever its mark stands, on a line of
    its own, and answers before the first question are left out. Several images of one question stay
    where their marks are.

    Args:
      record: An object with `conversations` or `messages`.
      name: The name of the sample.
      images: The images in the order of their marks.

    Raises:
      UserError: The conversation is empty, its roles do not take turns, a value is not text, an
        answer has an image, or marks and images are not equally many.
    """
    if not {"conversations", "messages"} & set(record):
        raise UserError(f"sample {name}: {_foreign(record)}")
    rounds = _rounds(record)
    if not isinstance(rounds, Sequence) or isinstance(rounds, str) or not rounds:
        raise UserError(f"sample {name}: the conversation is empty")
    for item in rounds:
        if not isinstance(item, Mapping) or not isinstance(_text(item), str):
            raise UserError(f"sample {name}: a turn of the conversation has no text")
    system = None
    if _role(rounds[0]) == "system":
        system, rounds = _text(rounds[0]), rounds[1:]
        if IMAGE_MARK in system:
            raise UserError(f"sample {name}: the system prompt contains {IMAGE_MARK}")
        if not rounds:
            raise UserError(f"sample {name}: the conversation is empty")
    roles = [_role(item) for item in rounds]
    first = roles.index("human") if "human" in roles else 0
    if len(roles[first:]) % 2 or roles[first:] != [*ROLES] * (len(roles[first:]) // 2):
        raise UserError(
            f"sample {name}: roles must be human and gpt in turn, got {', '.join(map(str, roles))}"
        )
    values = [_text(item) for item in rounds[first:]]
    questions, answers = values[::2], values[1::2]
    if any(IMAGE_MARK in answer for answer in answers):
        raise UserError(f"sample {name}: an answer contains {IMAGE_MARK}")
    marks = sum(question.count(IMAGE_MARK) for question in questions)
    if marks != len(images):
        raise UserError(
            f"sample {name}: the text has {marks} {IMAGE_MARK} but {len(images)} images are given"
        )
    turns = (Turn(_image_first(q), a) for q, a in zip(questions, answers, strict=True))
    cut = f"turns before the first question are left out: {first}" if first else ""
    own = system if system and system.strip() else None
    return Sample(name, tuple(turns), tuple(images), system=own, cut=cut)


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
    turns = (dataclasses.replace(t, question=q) for t, q in zip(sample.turns, asked, strict=True))
    context = found.group().lstrip()
    return dataclasses.replace(sample, turns=tuple(turns), context=context, independent=True)


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
    return record.get("image") or record.get("images") or ()


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


def _text(item: Mapping[str, Any]) -> Any:
    return item.get("value", item.get("content"))


def _image_first(question: str) -> str:
    if question.count(IMAGE_MARK) != 1:
        return question
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}".strip()


def measure(record: Any) -> tuple[int, int]:
    """The words and images of a record, which is not checked; samples are grouped by them."""
    try:
        rounds, images = _rounds(record), _images(record)
        words = sum(len(_text(item).split()) for item in rounds)
        return words, 1 if isinstance(images, str) else len(images)
    except (TypeError, KeyError, AttributeError):
        return 0, 0  # whoever asks for the sample is told what is wrong with it


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
        return np.concatenate([records.sizes for records in self.records])

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

    def image_paths(self, names: Sequence[str], name: str) -> list[Path]:
        """The paths of the images of the sample `name`.

        Raises:
          UserError: A path leaves the image root.
        """
        return [image_path(self.image_root, image, f"sample {name}") for image in names]

    def __getitem__(self, index: int) -> Sample:
        record, name = self.record(index)
        names = image_names(record, name)
        sample = to_sample(record, name, self.image_paths(names, name))
        return independent_turns(sample) if self.branches else sample
