"""Where the tokens of an answer look on its images, as JSON.

Axis legend: N images, L layers, H heads, Y, X patches of an image.
"""

import base64
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.inference.attention_maps import answer_maps, token_attention
from moresjax.inference.model import Model
from moresjax.reports.html import image_uri
from moresjax.serve.errors import ApiError


def answer_attention(
    model: Model, row: Row, ids: list[int], first: int, adapter: str | None
) -> dict[str, Any] | None:
    """Share, LMAR and maps of tokens of an answer; None without images or tokens.

    Runs on the scheduler's thread.

    Args:
      model: The model.
      row: The prompt.
      ids: The answer's tokens so far, without the one that ends it.
      first: The number of the first token that is told; with 0 the pictures are told too.
      adapter: The adapter that answered.
    """
    told = ids[first:]
    if not told or not row.num_images:
        return None
    found = token_attention(model, row, np.asarray(ids, np.int32), first=first, adapter=adapter)
    lmar = [[x if np.isfinite(x) else None for x in layers] for layers in found.lmar.tolist()]
    processor = model.prompts.processor.image
    assert processor is not None  # else the row had no image
    tokens = {
        "first": first,
        "tokens": [model.prompts.tokenizer.decode([token]) for token in told],
        "ids": told,
        "share": found.share.tolist(),
        "lmar": lmar,
        "maps": None if found.grids is None else _array(found.grids),
    }
    if first:
        return tokens
    pictures = [image_uri(x) for x in processor.to_picture(np.asarray(row.pixels))]
    return tokens | {"pictures": pictures, "heads": model.config.llm.num_heads}


def head_maps(
    model: Model, row: Row, ids: list[int], token: int, adapter: str | None
) -> dict[str, Any]:
    """The maps of every head for one token of an answer `[N, L, H, Y, X]`.

    The arguments are those of `answer_attention`, and the token's number.

    Raises:
      ApiError: The visual tokens have no place on the image, or the answer no such token.
    """
    tokens = np.asarray(ids, np.int32)
    try:
        return _array(answer_maps(model, row, tokens, places=[token], adapter=adapter)[:, :, :, 0])
    except UserError as error:
        raise ApiError(str(error)) from None


def _array(values: Float[np.ndarray, "..."]) -> dict[str, Any]:
    """An array as JSON takes it: shape, type, and its bytes in base64."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    encoded = base64.b64encode(data).decode()
    return {"shape": list(values.shape), "dtype": "<f4", "data": encoded}
