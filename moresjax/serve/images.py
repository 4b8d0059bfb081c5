"""Images of requests: data URIs, checked before a pixel of them is decoded."""

import base64
import binascii
import dataclasses
import io
from typing import Any

from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.images import open_image
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What images a request may have.

    Attributes:
      max_images: The most images of a conversation.
      max_pixels: The most pixels of an image.
    """

    max_images: int = 16
    max_pixels: int = 1 << 26


def read_image(part: Any, path: str, limits: ImageLimits) -> Image.Image:
    """The image of a part `{"type": "image_url", "image_url": {"url": "data:..."}}`.

    Nothing is fetched: a server that opens addresses for its clients opens its own network to them.

    Raises:
      ApiError: The address is no data URI, or no image that can be read.
    """
    url = part.get("image_url")
    url = url if isinstance(url, str) else Fields(url, f"{path}.image_url").text("url")
    param = f"{path}.image_url.url"
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
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("the data URI of an image is no base64", param=param) from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception:  # decoders of Pillow raise any kind of error for a damaged file
        raise ApiError("an image cannot be read: it has no known format", param=param) from None
    if width * height > limits.max_pixels:
        raise ApiError(
            f"an image has {width} x {height} pixels, more than the {limits.max_pixels} that this "
            "server reads",
            param=param,
        )
    try:
        return open_image(data)
    except UserError as error:
        raise ApiError(f"an image cannot be read: {error}", param=param) from None
