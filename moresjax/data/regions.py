"""Regions of interest: boxes in images, and the visual tokens that lie in them.

Axis legend: V visual tokens of an image.

A box is `(x0, y0, x1, y1)`, in shares of the image's width and height from its upper left corner.
It goes through the same padding, scaling and cropping as the image. A visual token is inside when
the centre of its patch is; a box between all centres has the nearest one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moresjax.core.errors import UserError

Box = tuple[float, float, float, float]
# The boxes of every image; None where nothing is said of one.
Regions = tuple[tuple[Box, ...] | None, ...]
# Where an image of width and height 1 lies in the square that an encoder sees: the place of its
# upper left corner, and its width and height there.
Placement = tuple[float, float, float, float]
WHOLE_SQUARE: Placement = (0.0, 0.0, 1.0, 1.0)
# Stands for all visual tokens of an image, those of padding and the class token too.
EVERYWHERE: Box = (-math.inf, -math.inf, math.inf, math.inf)


def check_regions(regions: Any, images: int, name: str) -> None:
    """Refuses regions that are not boxes inside of images, or not as many as images.

    Args:
      regions: What is said of every image.
      images: The number of images.
      name: What the message calls their owner, such as `sample 7`.

    Raises:
      UserError: The message says which box is wrong.
    """
    if len(regions) != images:
        raise UserError(f"{name}: regions of {len(regions)} images are given, but it has {images}")
    for boxes in regions:
        for box in boxes or ():
            _check_box(box, name)


def _check_box(box: Any, name: str) -> None:
    if box == EVERYWHERE:
        return
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))
    if not numbers:
        raise UserError(f"{name}: a box of a region is x0, y0, x1, y1, got {str(box)[:80]}")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(
            f"{name}: the box {tuple(box)} must lie in the image, 0 <= x0 < x1 <= 1 and "
            "0 <= y0 < y1 <= 1 in shares of its width and height"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_regions(given: Any, images: int, name: str) -> Regions | None:
    """Regions as people and files write them.

    >>> find_regions([0, 0, 0.5, 0.5], 1, "sample 1")
    (((0.0, 0.0, 0.5, 0.5),),)
    >>> find_regions([[[0, 0, 0.5, 0.5]], None], 2, "sample 1")
    (((0.0, 0.0, 0.5, 0.5),), None)

    Args:
      given: One box or a list of boxes, for a single image; or a list that has, for every image, a
        list of boxes or None. None: nothing is said.
      images: The number of images.
      name: What messages call the sample, such as `sample 7`.

    Raises:
      UserError: It is none of these, or a box lies outside the image.
    """
    if given is None:
        return None
    if not isinstance(given, list | tuple):
        raise UserError(f"{name}: a region must be a box or a list of boxes, got {str(given)[:80]}")
    if given and all(map(_is_number, given)):
        given = [[given]]
    elif images == 1 and not any(x is None or _holds_boxes(x) for x in given):
        given = [given]
    for boxes in given:
        if not (boxes is None or isinstance(boxes, list | tuple)):
            raise UserError(
                f"{name}: the regions of {images} images are a list with a list of boxes for each"
            )
    check_regions(given, images, name)
    return tuple(
        None if boxes is None else tuple((*map(float, box),) for box in boxes)  # pyright: ignore[reportReturnType]
        for boxes in given
    )


def _holds_boxes(value: Any) -> bool:
    """Whether it is a list of boxes, or an empty one, rather than a box."""
    return isinstance(value, list | tuple) and not any(map(_is_number, value))


def find_placement(
    size: Callable[[], tuple[int, int]], padded: bool, reference: Any = None
) -> Placement:
    """Where an image lies in the square that an image processor makes of it.

    Args:
      size: Tells width and height of the image; it is only asked where they matter.
      padded: Whether the image is first centred on a square.
      reference: The image processor of `transformers` that does the rest; None where the image is
        scaled to the square.
    """
    crops = scales = False
    given: dict[str, int] = {}
    if reference is not None:
        crops, scales = bool(reference.do_center_crop), bool(reference.do_resize)
        given = _sides(reference.size) if scales else {}
        if getattr(reference, "do_pad", False):
            if not hasattr(reference, "pad_to_square"):
                name = type(reference).__name__
                raise UserError(f"where {name} puts an image when it pads it is not known")
            padded = True
    if not padded and not crops and "shortest_edge" not in given:
        return WHOLE_SQUARE
    width, height = size()
    left, top, across, down = 0.0, 0.0, float(width), float(height)
    if padded:
        side = max(width, height)
        left, top = float((side - width) // 2), float((side - height) // 2)
        width = height = side
    if reference is None:
        return left / width, top / height, across / width, down / height
    if scales:
        new_width, new_height = _scaled(width, height, given)
        factors = new_width / width, new_height / height
        left, across, top, down = (
            x * factor
            for x, factor in zip((left, across, top, down), np.repeat(factors, 2), strict=True)
        )
        width, height = new_width, new_height
    if crops:
        wanted = _sides(reference.crop_size)
        left -= _cut(width, wanted["width"])
        top -= _cut(height, wanted["height"])
        width, height = wanted["width"], wanted["height"]
    return left / width, top / height, across / width, down / height


def _sides(size: Any) -> dict[str, int]:
    """The sides that an image processor of `transformers` is told, by name."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    given = {name: int(value) for name, value in dict(size).items() if value is not None}
    if set(given) not in ({"shortest_edge"}, {"height", "width"}):
        raise UserError(f"where an image lies after scaling to {given} is not known")
    return given


def _scaled(width: int, height: int, sides: Mapping[str, int]) -> tuple[int, int]:
    """Width and height after scaling to these sides; the longer side is rounded down."""
    if "shortest_edge" not in sides:
        return sides["width"], sides["height"]
    short = sides["shortest_edge"]
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cut(length: int, wanted: int) -> int:
    """How many pixels before its middle an image loses; negative for those that it is given."""
    return (length - wanted) // 2 if length >= wanted else -((wanted - length) // 2)


def tokens_inside(
    boxes: Sequence[Box], centres: Float[np.ndarray, "V 2"], placement: Placement = WHOLE_SQUARE
) -> Bool[np.ndarray, " V"]:
    """Which visual tokens of an image lie in its region.

    >>> centres = np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    >>> tokens_inside([(0.0, 0.0, 1.0, 0.5)], centres).tolist()
    [True, True, False, False]

    Args:
      boxes: The boxes of the image; without one no token is inside.
      centres: The centre (x, y) of every token's patch in the square that the encoder sees, from 0
        to 1; NaN for a token that stands for no place.
      placement: Where the image lies in that square.
    """
    inside = np.zeros(len(centres), bool)
    left, top, width, height = placement
    for box in boxes:
        if box == EVERYWHERE:
            return np.ones(len(centres), bool)
        x0, x1 = (left + width * x for x in (box[0], box[2]))
        y0, y1 = (top + height * y for y in (box[1], box[3]))
        x, y = centres.T
        found = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        if not found.any():
            distance = np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2)
            found[np.nanargmin(distance)] = True
        inside |= found
    return inside
