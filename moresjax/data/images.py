"""Images to normalised arrays.

Axis legend: Y, X pixels, 3 colour channels.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from moresjax.errors import UserError


def open_image(source) -> Image.Image:
    """An RGB image from a path, a PIL image or a uint8 array.

    Raises:
      UserError: when a file is missing or is not an image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    try:  # broken files make Pillow raise many kinds
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from None


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resizes to a square (bicubic), scales to 0..1 and normalises."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_pretrained(cls, folder: Path, size: int) -> "ImageProcessor":
        """With the mean and standard deviation of a folder's `preprocessor_config.json`, if any."""
        path = folder / "preprocessor_config.json"
        saved = json.loads(path.read_text()) if path.is_file() else {}
        names = {"mean": "image_mean", "std": "image_std"}
        return cls(size, **{k: tuple(saved[n]) for k, n in names.items() if n in saved})

    def __call__(self, source) -> Float[np.ndarray, "Y X 3"]:
        if not (isinstance(source, np.ndarray) and source.shape == (self.size, self.size, 3)):
            image = open_image(source)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            source = np.asarray(image)
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (source.astype(np.float32) / 255.0 - mean) / std
