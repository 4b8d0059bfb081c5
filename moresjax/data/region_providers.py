"""Where regions of interest come from when a command or a configuration names them.

    boxes            those of the samples and prompts themselves (the default)
    all              every visual token of every image
    center(60%)      the middle of the image: 60 % of its width and of its height
    random(60%)      a box of that width and height at a random place
    random           the boxes of the sample, each moved to a random place: a control; cells of a
                     grid stay cells
    FILE.json        boxes by the id of the sample, or by what stands before its last `:`
    0.1,0.2,0.5,0.6  this box in every image; several are joined by ;
    attention(8;20%) the fifth of the patches that the prompt's last token attends to most in layer
                     8 (counted from 0) of the model without its tuning; for prompts only

What is random depends on the sample's id and its number of the image only.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.core.reading import LARGE, read_json
from moresjax.data.regions import EVERYWHERE, Box, Regions, check_regions, find_regions
from moresjax.data.samples import Sample

PROVIDERS = (
    *("boxes", "all", "center(P%)", "random(P%)", "random", "x0,y0,x1,y1"),
    *("attention(LAYER;P%)", "FILE.json"),
)
_MIDDLE = 60.0  # per cent of the sides, where none are given


@dataclasses.dataclass(frozen=True)
class RegionProvider:
    """Gives samples their regions of interest.

    >>> from moresjax.data.samples import Turn
    >>> sample = Sample("1", (Turn("<image> what is it ?"),), images=("photo.jpg",))
    >>> region_provider("center(50%)")(sample).roi
    (((0.25, 0.25, 0.75, 0.75),),)

    Attributes:
      kind: `boxes`, `all`, `center`, `random`, `fixed`, `file` or `attention`.
      percent: The part of an image's width and height, with attention of its patches; 0 for boxes
        of the sample's own size.
      boxes: The boxes of `fixed`.
      layer: The layer of `attention`.
      named: What the file says by the name of a sample.
      text: What named it.
    """

    kind: str = "boxes"
    percent: float = 0.0
    boxes: tuple[Box, ...] = ()
    layer: int = 0
    named: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    text: str = dataclasses.field(default="boxes", compare=False)

    def __str__(self) -> str:
        return self.text

    def __call__(self, sample: Sample) -> Sample:
        """The sample with its regions; one without images stays as it is.

        Raises:
          UserError: Boxes are to be moved, and the sample has none; a file does not have it; or a
            model's attention is asked for, which only its prompts have.
        """
        if self.kind == "boxes" or not sample.images:
            return sample
        if self.kind == "attention":
            raise UserError(
                f"roi={self} asks a model where it looks, which training does not; give boxes to "
                "samples, or another roi"
            )
        if self.kind == "file":
            return dataclasses.replace(sample, roi=self._of_file(sample))
        own = sample.roi or [None] * len(sample.images)
        regions = tuple(self.boxes_of(sample.id, n, boxes) for n, boxes in enumerate(own))
        return dataclasses.replace(sample, roi=regions)

    def _of_file(self, sample: Sample) -> Regions | None:
        name = next((n for n in (sample.id, sample.id.rpartition(":")[0]) if n in self.named), None)
        if name is None:
            raise UserError(f"{self} has no boxes of sample {sample.id!r}")
        return find_regions(self.named[name], len(sample.images), f"{self}, {name}")

    def boxes_of(self, name: str, number: int, own: tuple[Box, ...] | None) -> tuple[Box, ...]:
        """The boxes of one image, of which its sample says `own`.

        Args:
          name: The id of the sample.
          number: The number of the image, from 0.
          own: The sample's own boxes.

        Raises:
          UserError: Boxes are to be moved, and there are none.
        """
        if self.kind == "all":
            return (EVERYWHERE,)
        if self.kind == "fixed":
            return self.boxes
        side = self.percent / 100
        if self.kind == "center":
            return (((1 - side) / 2, (1 - side) / 2, (1 + side) / 2, (1 + side) / 2),)
        if self.percent:
            own = ((0.0, 0.0, side, side),)
        if own is None:
            raise UserError(
                f"sample {name}: roi=random moves the boxes of samples, and this one has none; "
                "random(P%) makes boxes of P % of the sides"
            )
        rng = np.random.default_rng((zlib.crc32(name.encode()), number))
        return tuple(_moved(box, rng) for box in own)


def _percent(number: str, text: str) -> float:
    percent = float(number)
    if not 0 < percent <= 100:
        raise UserError(f"roi {text!r}: the part must be above 0 and up to 100 %")
    return percent


OWN_REGIONS = RegionProvider()


def _moved(box: Box, rng: np.random.Generator) -> Box:
    """A box of the same size anywhere in the image."""
    if box == EVERYWHERE:
        return box
    width, height = box[2] - box[0], box[3] - box[1]
    left, top = _corner(width, rng), _corner(height, rng)
    return left, top, min(left + width, 1.0), min(top + height, 1.0)


def _corner(side: float, rng: np.random.Generator) -> float:
    """Where a box of such a side starts; one that tiles the image starts where a tile does."""
    tiles = round(1 / side)
    if math.isclose(tiles * side, 1):
        return int(rng.integers(tiles)) * side
    return float(rng.random()) * (1 - side)


def region_provider(text: str) -> RegionProvider:
    """The provider of that name.

    >>> region_provider("random(20%)").percent
    20.0

    Raises:
      UserError: There is none of that name, a box lies outside the image, or a file of boxes is
        missing or no object of boxes by name.
    """
    if text in ("boxes", "all", "random"):
        return RegionProvider(text, text=text)
    if text == "center":
        return RegionProvider("center", _MIDDLE, text=text)
    if match := re.fullmatch(r"(center|random)\((\d{1,9}(?:\.\d{1,20})?)%\)", text):
        return RegionProvider(match[1], _percent(match[2], text), text=text)
    if match := re.fullmatch(r"attention\((\d{1,9});(\d{1,9}(?:\.\d{1,20})?)%\)", text):
        percent = _percent(match[2], text)
        return RegionProvider("attention", percent, layer=int(match[1]), text=text)
    number = r"(?:\d{1,20}(?:\.\d{1,20})?|\.\d{1,20})"
    if re.fullmatch(rf"{number}(,{number}){{3}}(;{number}(,{number}){{3}})*", text):
        parts = [tuple(map(float, part.split(","))) for part in text.split(";")]
        check_regions([parts], 1, "roi")
        return RegionProvider("fixed", boxes=tuple((a, b, c, d) for a, b, c, d in parts), text=text)
    if text.endswith(".json"):
        return RegionProvider("file", named=_read(Path(text)), text=text)
    raise choice_error("roi", text, PROVIDERS)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], what="file of regions", most=LARGE)
