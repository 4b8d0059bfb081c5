"""Images to normalised arrays.

Axis legend: Y, X pixels, 3 colour channels.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from moresjax.core.errors import UserError, choice_error
from moresjax.core.reading import reason_of
from moresjax.data.regions import Placement, find_placement
from moresjax.data.saved_processors import check_image_processor

# Longer than this, an image whose shorter side is enlarged would not fit into memory.
MAX_ASPECT = 200
MAX_PIXELS = 89_478_485  # from which on Pillow warns; decoded they take 256 MiB
THREADS = 4  # that open images ahead of time
ASPECTS = ("square", "pad")
_LONGEST_NAME = 1000  # of a path in an error message; a longer one is cut in the middle


@dataclasses.dataclass(frozen=True)
class UnusableImage:
    """Stands where an image should be that must not or cannot be opened.

    Whoever wants its pixels gets a `UserError`, so that it costs its own question or sample only.

    Attributes:
      reason: Why there is no image, in one sentence.
    """

    reason: str


# What images are given as: a path, the bytes of a file, a PIL image or a uint8 array `[Y, X, 3]`.
ImageInput = str | Path | bytes | Image.Image | np.ndarray | UnusableImage


def image_keys(images: Sequence) -> tuple:
    """Keys that tell images apart, as long as they exist, without opening them."""
    return tuple(x if isinstance(x, (str, Path, bytes)) else id(x) for x in images)


def image_names(images: Sequence) -> list[str]:
    """Names that tell images apart in files: those of files, digests of other images.

    >>> image_names(["a.jpg", np.zeros((2, 2, 3), np.uint8)])
    ['a.jpg', '15ec7bf0b50732b4']
    """
    return [x if isinstance(x, str) else _digest(x) for x in images]


def _digest(image: object) -> str:
    if isinstance(image, Image.Image):
        image = getattr(image, "filename", "") or image.tobytes()
    if isinstance(image, np.ndarray):
        image = np.ascontiguousarray(image).tobytes()
    return hashlib.sha256(image).hexdigest()[:16] if isinstance(image, bytes) else str(image)


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


def image_path(root: str | Path, image: str, name: str) -> Path:
    """The path of an image that a file names, which never leaves its root.

    >>> image_path("photos", "cats/1.jpg", "sample 7").as_posix()
    'photos/cats/1.jpg'

    Args:
      root: The folder that image paths start from.
      image: The path in the file.
      name: What the message calls the item, such as `sample 7`.

    Raises:
      UserError: The path is absolute or leads out of the root.
    """
    path = os.path.normpath(image)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise UserError(f"{name}: image {image} is outside of the image root")
    return Path(root) / path


def named_image(root: str | Path, image: str, name: str) -> Path | bytes:
    r"""The image behind a name in a file: a path below the root, or the bytes of a `data:` URL.

    >>> named_image("photos", "data:image/png;base64,iVBORw==", "sample 7")
    b'\x89PNG'

    Args:
      root: The folder that image paths start from.
      image: The path or URL in the file.
      name: What the message calls the item, such as `sample 7`.

    Raises:
      UserError: The path leads out of the root, the URL is damaged, or it is not a `data:` URL.
    """
    head, comma, body = image.partition(",")
    if head.lower().startswith("data:"):
        if not comma or not head.lower().endswith(";base64"):
            raise UserError(f"{name}: a data: URL is data:TYPE;base64,..., not {image[:40]}...")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{name}: the data: URL {image[:40]}... is not base64") from None
    if "://" in image:
        raise UserError(
            f"{name}: image {image} is not fetched, since no command uses the network; give its "
            "path below the image root, or a data: URL"
        )
    return image_path(root, image, name)


def _check_exists(source: ImageInput) -> None:
    if isinstance(source, UnusableImage):
        raise UserError(source.reason)
    try:
        found = not isinstance(source, (str, Path)) or Path(source).is_file()
    except (OSError, ValueError) as error:  # too long a name, no permission, a zero byte
        raise UserError(f"{_name(source)} cannot be read: {_reason(error)}") from None
    if not found:
        raise UserError(f"{_name(source)} does not exist")


def _name(source: ImageInput) -> str:
    """What messages call an image."""
    if not isinstance(source, (str, Path)):
        return "array" if isinstance(source, np.ndarray) else "image"
    text = str(source)
    long = len(text) > _LONGEST_NAME
    return f"image {text[:80]}...{text[-40:]}" if long else f"image {text}"


def _reason(error: Exception) -> str:
    """What an error says, in one line and without the path that an `OSError` repeats."""
    return "it is no image file" if isinstance(error, UnidentifiedImageError) else reason_of(error)


def open_image(source: ImageInput, name: str = "") -> Image.Image:
    """An RGB image from a path, the bytes of a file, a PIL image or a uint8 array.

    >>> open_image(np.zeros((4, 6, 3), np.uint8)).size
    (6, 4)

    Transparency is dropped, which the reference implementations do too; 16-bit greys are scaled to
    8 bits.

    Args:
      source: The image.
      name: What messages call it; empty: `image` with the path of a file.

    Raises:
      UserError: A file is missing or is not an image, or the image is too large, too long for its
        width, or of 32-bit numbers.
    """
    _check_exists(source)
    name = name or _name(source)
    try:  # decoders of Pillow raise any kind of error for a damaged file
        return _rgb(_opened(source, name), name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from None


def _opened(source: ImageInput, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype.kind == "f":
            raise UserError(
                f"an image is an array of {source.dtype}; give uint8, which is (255 * x)"
                ".round().astype(np.uint8) for values from 0 to 1"
            )
        return Image.fromarray(source)
    assert not isinstance(source, UnusableImage)  # it was asked whether it exists
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,d} are read; "
            "make it smaller"
        )
    image.load()
    return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    short, long = sorted(image.size)
    if long > MAX_ASPECT * max(short, 1):
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels; "
            f"its sides may differ {MAX_ASPECT}-fold at most"
        )
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UserError(
            f"{name} has numbers of 32 bits as pixels, of which nothing says how bright they are; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _size_of(source: ImageInput) -> tuple[int, int]:
    """Width and height of an image, whose pixels are not decoded where it is a file."""
    _check_exists(source)
    assert not isinstance(source, UnusableImage)  # it was asked whether it exists
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.size
    except Exception as error:  # decoders of Pillow raise any kind of error for a damaged file
        raise UserError(f"{_name(source)} cannot be read: {_reason(error)}") from None


def saved_processor(folder: Path) -> Any:
    """The image processor that `transformers` saved in a folder; None when there is none.

    Raises:
      UserError: A file of it is damaged, or has a key that would be ignored.
    """
    if not check_image_processor(folder):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} has no image processor that can be used: {reason}") from None


def saved_image_size(folder: Path) -> int | None:
    """The side of the squares that a folder's image processor makes; None when it has none.

    Raises:
      UserError: It makes something else than a square.
    """
    reference = saved_processor(folder)
    if reference is None:
        return None
    height, width = _made(reference, 64, folder)
    if height != width:
        raise UserError(f"{folder}: images become {height} x {width}, which is not a square")
    return height


def _made(reference: Callable, side: int, folder: Path) -> tuple[int, int]:
    """Height and width of what an image processor of `transformers` makes of a square."""
    image = Image.new("RGB", (side, side))
    shape = np.shape(reference(images=image, return_tensors="np")["pixel_values"][0])
    if len(shape) != 3:
        raise UserError(f"{folder} cuts images into several pieces, which is not supported")
    return shape[1], shape[2]


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
    def from_pretrained(
        cls,
        folder: Path,
        size: int,
        aspect: str = "square",
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> "ImageProcessor":
        """The processor saved in a folder, or one for the encoder when none was saved.

        Args:
          folder: The folder.
          size: The height and width that the model takes.
          aspect: How images become squares, see the class.
          mean: The mean of every channel where none was saved.
          std: The standard deviation of every channel where none was saved.

        Raises:
          UserError: It makes images of another size than the model takes.
        """
        reference = saved_processor(folder)
        if reference is None:
            (r, g, b), (x, y, z) = mean, std
            return cls(size, (r, g, b), (x, y, z), aspect)
        own_mean, own_std = (tuple(x) for x in (reference.image_mean, reference.image_std))
        processor = cls(size, own_mean, own_std, aspect, reference)
        made = _made(reference, size, folder)
        if made != (size, size):
            raise UserError(f"{folder}: images become {made[0]} x {made[1]}, not {size} x {size}")
        return processor

    def to_picture(self, pixels: Float[np.ndarray, "*N Y X 3"]) -> UInt8[np.ndarray, "*N Y X 3"]:
        """Images as they were before they were normalised.

        >>> processor = ImageProcessor(size=1)
        >>> processor.to_picture(processor(np.full((1, 1, 3), 200, np.uint8))).tolist()
        [[[200, 200, 200]]]
        """
        values = pixels * np.asarray(self.std) + np.asarray(self.mean)
        return (values.clip(0, 1) * 255).round().astype(np.uint8)

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
            try:
                pixels = self.reference(images=image, return_tensors="np")["pixel_values"][0]
            except Exception as error:  # whatever it does not like about this image
                raise UserError(f"{_name(source)} cannot be used: {_reason(error)}") from None
            return np.asarray(pixels, np.float32).transpose(1, 2, 0)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self._normalise(np.asarray(image))

    def placement(self, source: ImageInput) -> Placement:
        """Where an image lies in the square that is made of it; parts of it may lie outside.

        >>> ImageProcessor(size=32, aspect="pad").placement(np.zeros((10, 20, 3), np.uint8))
        (0.0, 0.25, 1.0, 0.5)

        Raises:
          UserError: The image cannot be read.
        """
        return find_placement(lambda: _size_of(source), self.aspect == "pad", self.reference)

    def _normalise(self, pixels: np.ndarray) -> Float[np.ndarray, "Y X 3"]:
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (pixels.astype(np.float32) / 255.0 - mean) / std
