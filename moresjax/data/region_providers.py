"""Where regions of interest come from when a command or a configuration names them.

    boxes            those of the samples and prompts themselves (the default)
    all              every visual token of every image
    center(60%)      the middle of the image: 60 % of its width and of its height
    random(60%)      a box of that width and height at a random place
    random           the boxes of the sample, each moved to a random place: a control
    0.1,0.2,0.5,0.6  this box in every image; several are joined by ;
    attention(8;20%) the fifth of the patches that the prompt's last token attends to most in layer
                     8 (counted from 0) of the model without its tuning; for prompts only

What is random depends on the sample's id and its number of the image only.
"""

import dataclasses
import re
import zlib

import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.data.regions import EVERYWHERE, Box, check_regions
from moresjax.data.samples import Sample

PROVIDERS = (
    *("boxes", "all", "center(P%)", "random(P%)", "random", "x0,y0,x1,y1"),
    "attention(LAYER;P%)",
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
      kind: `boxes`, `all`, `center`, `random`, `fixed` or `attention`.
      percent: The part of an image's width and height, with attention of its patches; 0 for boxes
        of the sample's own size.
      boxes: The boxes of `fixed`.
      layer: The layer of `attention`.
      text: What named it.
    """

    kind: str = "boxes"
    percent: float = 0.0
    boxes: tuple[Box, ...] = ()
    layer: int = 0
    text: str = dataclasses.field(default="boxes", compare=False)

    def __str__(self) -> str:
        return self.text

    def __call__(self, sample: Sample) -> Sample:
        """The sample with its regions; one without images stays as it is.

        Raises:
          UserError: Boxes are to be moved, and the sample has none; or a model's attention is
            asked for, which only its prompts have.
        """
        if self.kind == "boxes" or not sample.images:
            return sample
        if self.kind == "attention":
            raise UserError(
                f"roi={self} asks a model where it looks, which training and chats do not; give "
                "boxes to samples, or another roi"
            )
        own = sample.roi or [None] * len(sample.images)
        regions = tuple(self._region(sample.id, n, boxes) for n, boxes in enumerate(own))
        return dataclasses.replace(sample, roi=regions)

    def _region(self, name: str, number: int, own: tuple[Box, ...] | None) -> tuple[Box, ...]:
        """The boxes of one image, of which its sample says `own`."""
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
    left, top = rng.random(2) * (1 - width, 1 - height)
    return float(left), float(top), min(float(left) + width, 1.0), min(float(top) + height, 1.0)


def region_provider(text: str) -> RegionProvider:
    """The provider of that name.

    >>> region_provider("random(20%)").percent
    20.0

    Raises:
      UserError: There is none of that name, or a box lies outside the image.
    """
    if text in ("boxes", "all", "random"):
        return RegionProvider(text, text=text)
    if text == "center":
        return RegionProvider("center", _MIDDLE, text=text)
    if match := re.fullmatch(r"(center|random)\((\d+(?:\.\d+)?)%\)", text):
        return RegionProvider(match[1], _percent(match[2], text), text=text)
    if match := re.fullmatch(r"attention\((\d+);(\d+(?:\.\d+)?)%\)", text):
        percent = _percent(match[2], text)
        return RegionProvider("attention", percent, layer=int(match[1]), text=text)
    number = r"\d*\.?\d+"
    if re.fullmatch(rf"{number}(,{number}){{3}}(;{number}(,{number}){{3}})*", text):
        parts = [tuple(map(float, part.split(","))) for part in text.split(";")]
        check_regions([parts], 1, "roi")
        return RegionProvider("fixed", boxes=tuple((a, b, c, d) for a, b, c, d in parts), text=text)
    raise choice_error("roi", text, PROVIDERS)
