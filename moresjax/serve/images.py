"""Images of requests: the files in data URIs, or of allowed hosts; their headers are read here.

Their pixels are decoded when the prompt is made, one image at a time.
"""

import base64
import binascii
import dataclasses
import io
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.serve.remote_images import RemoteLimits, fetch_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow starts programs for some of the others
TOGETHER = 4
ImagePart = tuple[Any, str]  # a part of a message and where it stands in the request


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What images a request may have.

    Attributes:
      max_images: The most images of a conversation.
      max_pixels: The most pixels of an image; those of a request have `TOGETHER` times as many.
      remote: What may be fetched from other servers; nothing by default.
    """

    max_images: int = 16
    max_pixels: int = 1 << 26
    remote: RemoteLimits = dataclasses.field(default_factory=RemoteLimits)


def read_images(parts: Sequence[ImagePart], limits: ImageLimits) -> tuple[bytes, ...]:
    """The image files of parts `{"type": "image_url", "image_url": {"url": "data:..."}}`.

    Nothing is fetched but from hosts of `limits.remote`.

    Raises:
      ApiError: An address is no data URI and not allowed, or there is no image, or the images have
        too many pixels.
    """
    files, total, ends = [], 0, time.monotonic() + limits.remote.seconds
    for part, path in parts:
        param = f"{path}.image_url.url"
        data = _file(part, path, param, limits.remote, ends)
        width, height = _size(data, param)
        if width * height > limits.max_pixels:
            raise ApiError(
                f"an image has {width} x {height} pixels, more than the {limits.max_pixels} that "
                "this server reads",
                param=param,
            )
        total += width * height
        if total > TOGETHER * limits.max_pixels:
            raise ApiError(
                f"the images of a request may have {TOGETHER * limits.max_pixels} pixels together",
                param=param,
            )
        files.append(data)
    return tuple(files)


def _file(part: Any, path: str, param: str, remote: RemoteLimits, ends: float) -> bytes:
    """The bytes in the data URI of a part, or at its address."""
    url = part.get("image_url")
    url = url if isinstance(url, str) else Fields(url, f"{path}.image_url").text("url")
    if url is not None and remote.hosts and not url.startswith("data:"):
        return fetch_image(url, remote, ends, param)
    if url is None or not url.startswith("data:"):
        raise ApiError(
            "an image must be a data URI such as data:image/png;base64,...; this server fetches "
            "no addresses",
            param=param,
        )
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError("a data URI of an image must be in base64", param=param)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("the data URI of an image is no base64", param=param) from None


def _size(data: bytes, param: str) -> tuple[int, int]:
    """Width and height of an image, from its header."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # decoders of Pillow raise any kind of error for a damaged file
        known = ", ".join(FORMATS)
        raise ApiError(
            f"an image cannot be read: it has no known format; there are {known}", param=param
        ) from None
