"""What a user says of a prompt: its images, its regions and its marks.

Axis legend: Y, X pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.images import ImageInput, UnusableImage
from moresjax.data.region_providers import RegionProvider, region_provider
from moresjax.data.regions import find_regions
from moresjax.data.samples import IMAGE_MARK, Sample, Turn, find_marks

if TYPE_CHECKING:
    # One image: a path, the bytes of a file, a PIL image, or a uint8 array [Y, X, 3].
    ImageLike = ImageInput | jax.Array
    PromptImages = ImageLike | Sequence[ImageLike] | None  # of one prompt
    Images = PromptImages | Sequence[PromptImages]  # of one prompt or of a list of prompts
else:  # wrong images are told by `check_images`, not by run-time checks of types
    ImageLike = PromptImages = Images = object


def check_images(images: Images, of: str = "the prompt") -> tuple[ImageInput, ...]:
    """The images of one prompt: none, one image, or a list of images.

    Args:
      images: The images as the user gave them.
      of: What they belong to, for error messages.

    Raises:
      UserError: for anything that is not clearly one image or a flat list of images.
    """
    if images is None:
        return ()
    if isinstance(images, list | tuple):
        return tuple(_check_image(image, of) for image in images)
    return (_check_image(images, of),)


def _check_image(image: object, of: str) -> ImageInput:
    if isinstance(image, jax.Array):
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 3
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (3, 4):
            raise UserError(
                f"an image of {of} is an array {image.dtype}{list(image.shape)}; an image is a "
                "uint8 array [Y, X, 3], and several images are a list of them"
            )
    elif isinstance(image, list | tuple):
        raise UserError(f"the images of {of} are nested too deeply; give one image or a flat list")
    elif not isinstance(image, str | Path | bytes | Image.Image | UnusableImage):
        raise UserError(
            f"an image of {of} is of type {type(image).__name__}; give a path, a PIL image or a "
            "uint8 array [Y, X, 3]"
        )
    return image


def pair_images(
    prompts: str | Sequence[str], images: Images
) -> tuple[list[str], list[tuple[ImageInput, ...]]]:
    """Prompts as a list, and the images of each.

    A single prompt takes an image or a list of images; a list of prompts takes a list with an
    image, a list of images or None for each of them.

    Raises:
      UserError: when images cannot be assigned to prompts in one way only.
    """
    if isinstance(prompts, str):
        return [prompts], [check_images(images)]
    prompts = list(prompts)
    if wrong := next((p for p in prompts if not isinstance(p, str)), None):
        raise UserError(f"a prompt must be a text, got a {type(wrong).__name__}")
    if images is None:
        return prompts, [()] * len(prompts)
    if not isinstance(images, list | tuple):
        raise UserError(
            f"{len(prompts)} prompts need a list with the images of each, got a "
            f"{type(images).__name__}"
        )
    if len(images) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(images)} entries of images")
    return prompts, [check_images(own, f"prompt {n}") for n, own in enumerate(images)]


def pair_continuations(
    prompts: str | Sequence[str],
    continuations: Sequence[str] | Sequence[Sequence[str]],
    count: int,
) -> list[list[str]]:
    """The answers to score for each of `count` prompts.

    Raises:
      UserError: Answers cannot be assigned to prompts in one way only.
    """
    if isinstance(continuations, str):
        raise UserError("the answers to score must be a list of texts, got a single text")
    if isinstance(prompts, str):
        given = [continuations]
    elif any(isinstance(answers, str) for answers in continuations):
        raise UserError(f"{count} prompts need a list of answers each, got a list of texts")
    else:
        given = list(continuations)
    if len(given) != count:
        raise UserError(f"{count} prompts but {len(given)} lists of answers")
    lists: list[list[str]] = []
    for answers in given:
        lists.append([answer for answer in answers if isinstance(answer, str)])
        if len(lists[-1]) != len(answers):
            raise UserError("an answer to score must be a text")
    return lists


def mark_images(text: str, images: Sequence) -> str:
    """The text with a mark for every image: at its start, unless it has marks of its own."""
    return text if IMAGE_MARK in text else (IMAGE_MARK + "\n") * len(images) + text


def asked_sample(
    name: str,
    text: str,
    images: tuple[ImageInput, ...],
    system: str | None = None,
    roi: Any = None,
    marks: Any = None,
    answer: str | None = None,
) -> Sample:
    """What a user says as a sample of one turn; images without a mark go first.

    Args:
      name: What error messages call it.
      text: What the user says.
      images: Its images.
      system: The system prompt; None for the template's.
      roi: The boxes of the images, see `find_regions`, or a provider's name.
      marks: Pieces of the text by name, see `find_marks`.
      answer: The answer, if it is given.

    Raises:
      UserError: A box or a mark is none.
    """
    question = mark_images(text, images)
    moved = len(question) - len(text)  # of marks for images, which come first
    found = find_marks(marks, [text], name)
    own = (replace(m, start=m.start + moved, end=m.end + moved) for m in found)
    sample = Sample(name, (Turn(question, answer),), images, system=system, marks=tuple(own))
    if isinstance(roi, str):
        return region_provider(roi)(sample)
    return sample if roi is None else replace(sample, roi=find_regions(roi, len(images), name))


def pair_pointed(
    prompts: str | Sequence[str], roi: Any = None, marks: Any = None
) -> tuple[list[Any], list[Any]]:
    """The regions and the marks of every prompt, as `Model.generate` takes them.

    Raises:
      UserError: They cannot be assigned to prompts in one way only.
    """
    if isinstance(roi, str):
        roi = region_provider(roi)  # once for all prompts: there may be a file to read
    if isinstance(prompts, str):
        return [roi], [marks]
    regions = _for_each(roi, RegionProvider, len(prompts), "regions of each (roi)")
    return regions, _for_each(marks, Mapping, len(prompts), "marks of each")


def _for_each(given: Any, shared: type, count: int, what: str) -> list[Any]:
    """What each of `count` prompts is given; a value of the type `shared` is of all."""
    if given is None or isinstance(given, shared):
        return [given] * count
    if not isinstance(given, list | tuple) or len(given) != count:
        raise UserError(f"{count} prompts need a list with the {what}")
    return list(given)
