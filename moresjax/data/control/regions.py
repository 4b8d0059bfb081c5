"""Regions of interest for control: where the visual editors act.

The paper edits the patches of "objects" and does not say how they are found, so the region has a
provider of its own:

    boxes          those of the data set: a digit's cell, the words that an OCR system found
    center(60%)    a box of 60% of both sides in the middle (CIFAR-10's objects are there)
    all            the whole image
    random         a control: boxes of the same size as the data set's own, elsewhere
    random(60%)    a control: a box of 60% of both sides, anywhere
    FILE.json      boxes by the name of the sample
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.data.regions import Box, find_regions

KINDS = ("boxes", "center(60%)", "all", "random", "random(60%)", "FILE.json")
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Regions:
    """A provider of regions.

    >>> parse_regions("center(50%)").boxes("a", (), np.random.default_rng(0))
    ((0.25, 0.25, 0.75, 0.75),)

    Attributes:
      kind: `boxes`, `center`, `all`, `random` or `file`.
      side: The sides of a box as a share of the image's; 0: those of the data set's boxes.
      named: Boxes by the name of a sample, of `file`.
    """

    kind: str
    side: float = 0.0
    named: Mapping[str, Sequence[Box]] = dataclasses.field(default_factory=dict)

    def boxes(self, name: str, own: Sequence[Box], rng: np.random.Generator) -> tuple[Box, ...]:
        """The region of a sample.

        Args:
          name: The name of the sample.
          own: The data set's own boxes, which may be none.
          rng: Draws random boxes.

        Raises:
          UserError: A file of boxes does not have the sample.
        """
        if self.kind == "boxes":
            return tuple(own)
        if self.kind == "all":
            return (WHOLE,)
        if self.kind == "center":
            low, high = 0.5 - self.side / 2, 0.5 + self.side / 2
            return ((low, low, high, high),)
        if self.kind == "random":
            sizes = [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in own]
            sizes = [(self.side, self.side)] if self.side else sizes
            return tuple(_elsewhere(width, height, rng) for width, height in sizes)
        if name not in self.named:
            raise UserError(f"the file of regions has no boxes of sample {name!r}")
        return tuple(self.named[name])

    @property
    def randomized(self) -> "Regions":
        """The control of the same size: random boxes."""
        return dataclasses.replace(self, kind="random", named={})


def _elsewhere(width: float, height: float, rng: np.random.Generator) -> Box:
    """A box of a size; one that tiles the image has its corner where a tile has it."""
    x0, y0 = (_corner(side, rng) for side in (width, height))
    return (x0, y0, min(x0 + width, 1.0), min(y0 + height, 1.0))


def _corner(side: float, rng: np.random.Generator) -> float:
    places = 1 / side if side else 1.0
    if round(places) == places:  # cells of a grid
        return float(rng.integers(int(places))) * side
    return float(rng.uniform(0, 1 - side))


def parse_regions(text: str, default: str = "boxes") -> Regions:
    """The provider that a text names; the default one for an empty text.

    Raises:
      UserError: There is no such provider, a share is not between 0 and 100%, or a file of boxes is
        missing or is no object of boxes.
    """
    text = text or default
    if text in ("boxes", "all", "random"):
        return Regions(text)
    if found := re.fullmatch(r"(center|random)\((\d+(?:\.\d+)?)%\)", text):
        side = float(found[2]) / 100
        if not 0 < side <= 1:
            raise UserError(f"region {text!r} needs a share above 0 and up to 100%")
        return Regions(found[1], side)
    if text.endswith(".json"):
        return Regions("file", named=_read(Path(text)))
    raise choice_error("region", text, KINDS)


def _read(path: Path) -> dict[str, Sequence[Box]]:
    if not path.is_file():
        raise UserError(f"file of regions {path} does not exist")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be an object with lists of boxes by the name of a sample")
    regions = {name: find_regions(own, 1, f"{path}, {name}") for name, own in found.items()}
    return {name: own[0] or () for name, own in regions.items() if own is not None}
