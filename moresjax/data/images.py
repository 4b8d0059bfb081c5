"""Images to normalised arrays.

Axis legend: Y, X pixels, 3 colour channels.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from moresjax.core.errors import UserError, choice_error

# Longer than this, an image whose shorter side is enlarged would not fit into memory.
MAX_ASPECT = 200
THREADS = 4  # that open images ahead of time
ASPECTS = ("square", "pad")
# Files in which transformers saves image processors, without their ending.
SAVED = ("preprocessor", "processor")


# What images are given as: a path, the bytes of a file, a PIL image or a uint8 array `[Y, X, 3]`.
ImageInput = str | Path | bytes | Image.Image | np.ndarray


def image_keys(images: Sequence) -> tuple:
    """Keys that tell images apart, as long as they exist, without opening them."""
    return tuple(x if isinstance(x, (str, Path, bytes)) else id(x) for x in images)


class LazyPixels:
    """Pixels of images that are opened when they are asked for, or a little before.

    Args:
      images: The images; files must exist.
      read: Makes an array `[N, Y, X, 3]` of them.

    Raises:
      UserError: A file is missing. `np.asarray` and `open` raise what `read` raises.
    """

    def __init__(self, images: Sequence[ImageInput], read: Callable[[], np.ndarray]) -> None:
        for image in images:
            _check_exists(image)
        self._count, self._read = len(images), read
        self._coming: Future[np.ndarray] | None = None
        self._held: np.ndarray | None = None

    def __len__(self) -> int:
        return self._count

    def fetch(self) -> None:
        """Starts to open the images in another thread."""
        if self._coming is None and self._held is None:
            self._coming = _threads().submit(self._read)

    def open(self) -> None:
        """Opens the images now, and keeps their pixels."""
        if self._held is None:
            self._held = np.asarray(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        coming, self._coming = self._coming, None
        pixels = self._held
        if pixels is None:
            pixels = self._read() if coming is None else coming.result()
        return pixels if dtype is None else pixels.astype(dtype, copy=False)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "images")


def _check_exists(source: ImageInput) -> None:
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise UserError(f"image {source} does not exist")


def open_image(source: ImageInput) -> Image.Image:
    """An RGB image from a path, the bytes of a file, a PIL image or a uint8 array.

    >>> open_image(np.zeros((4, 6, 3), np.uint8)).size
    (6, 4)

    Transparency is dropped, which the reference implementations do too; 16-bit greys are scaled to
    8 bits.

    Raises:
      UserError: A file is missing or is not an image, or the image is too long for its width.
    """
    if isinstance(source, np.ndarray):
        image, name = Image.fromarray(source), "array"
    elif isinstance(source, Image.Image):
        image, name = source, "image"
    elif isinstance(source, bytes):
        image, name = _read(io.BytesIO(source), "image"), "image"
    else:
        name = f"image {source}"
        _check_exists(source)
        image = _read(Path(source), name)
    short, long = sorted(image.size)
    if long > MAX_ASPECT * max(short, 1):
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels; "
            f"its sides may differ {MAX_ASPECT}-fold at most"
        )
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _read(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:  # broken files make Pillow raise many kinds
        image = Image.open(file)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no image file" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name} cannot be read: {reason}") from None
    return image


def saved_processor(folder: Path) -> Any:
    """The image processor that `transformers` saved in a folder; None when there is none.

    Raises:
      UserError: There is one, but it cannot be used.
    """
    if not any((folder / f"{name}_config.json").is_file() for name in SAVED):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no image processor that can be used: {reason}") from None


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of that colour (LLaVA-1.5's `pad` aspect mode)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Scales images to a square, to 0..1, and normalises.

    >>> ImageProcessor(size=32)(np.zeros((10, 20, 3), np.uint8)).shape
    (32, 32, 3)

    Attributes:
      size: The height and width of the result in pixels.
      mean: The mean of every channel, which is subtracted.
      std: The standard deviation of every channel, which the rest is divided by.
      aspect: `square` leaves the shape to the scaling; `pad` first pads with the mean colour.
      reference: An image processor of `transformers` that does everything after `aspect`; without
        one, images are scaled to the square (bicubic).
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    aspect: str = "square"
    reference: Callable | None = None

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS:
            raise choice_error("image aspect", self.aspect, ASPECTS)

    @classmethod
    def from_pretrained(cls, folder: Path, size: int, aspect: str = "square") -> "ImageProcessor":
        """The processor saved in a folder, or the default one when none was saved.

        Raises:
          UserError: It makes images of another size than the model takes.
        """
        reference = saved_processor(folder)
        if reference is None:
            return cls(size, aspect=aspect)
        mean, std = (tuple(x) for x in (reference.image_mean, reference.image_std))
        processor = cls(size, mean, std, aspect, reference)
        made = processor(np.zeros((size, size, 3), np.uint8)).shape[:2]
        if made != (size, size):
            raise UserError(f"{folder}: images become {made[0]} x {made[1]}, not {size} x {size}")
        return processor

    def __call__(self, source: ImageInput) -> Float[np.ndarray, "Y X 3"]:
        """The pixels of an image.

        Raises:
          UserError: The image cannot be read.
        """
        shape = (self.size, self.size, 3)
        if self.reference is None and isinstance(source, np.ndarray) and source.shape == shape:
            return self._normalise(source)
        image = open_image(source)
        if self.aspect == "pad":
            red, green, blue = (int(255 * x) for x in self.mean)
            image = pad_to_square(image, (red, green, blue))
        if self.reference is not None:
            pixels = self.reference(images=image, return_tensors="np")["pixel_values"][0]
            return np.asarray(pixels, np.float32).transpose(1, 2, 0)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self._normalise(np.asarray(image))

    def _normalise(self, pixels: np.ndarray) -> Float[np.ndarray, "Y X 3"]:
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (pixels.astype(np.float32) / 255.0 - mean) / std
