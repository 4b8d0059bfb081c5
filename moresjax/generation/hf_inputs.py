"""Token ids, masks and images with the conventions of `transformers`, as a batch.

Axis legend: B rows, S tokens.
"""

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind, TokenLayout


def hf_batch(
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    pixel_values: ArrayLike | None = None,
    image_token_id: int | None = None,
    visual_tokens: int = 0,
    vocab_size: int = 0,
) -> Batch:
    """A batch from what a processor of `transformers` returns.

    >>> batch = hf_batch([[0, 5, 6]], attention_mask=[[0, 1, 1]])
    >>> batch.layout.position.tolist()
    [[0, 0, 1]]

    Args:
      input_ids: Token ids `[B, S]`, one `image_token_id` per visual token.
      attention_mask: `[B, S]`, 0 for padding on either side; default: all ones.
      pixel_values: The images of all rows in order, `[images, 3, height, width]`.
      image_token_id: The id that stands for a visual token.
      visual_tokens: The number of visual tokens per image.
      vocab_size: The number of embeddings; 0 for any number.

    Raises:
      UserError: An id has no embedding, or the image tokens of a row are not those of whole images
        or do not match the images that are given.
    """
    ids = np.asarray(input_ids, np.int32)
    valid = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask) > 0
    is_image = (
        (ids == image_token_id) & valid if image_token_id is not None else np.zeros_like(valid)
    )
    words = np.where(valid & ~is_image, ids, 0)
    if vocab_size and words.size and not 0 <= words.min() <= words.max() < vocab_size:
        wrong = words.max() if words.max() >= vocab_size else words.min()
        raise UserError(f"token id {wrong} is none of the model's {vocab_size} embeddings")
    counts = is_image.sum(1)
    per_row = counts // max(visual_tokens, 1)
    pixels = None if pixel_values is None else np.asarray(pixel_values, np.float32)
    given = 0 if pixels is None else len(pixels)
    if (counts != per_row * visual_tokens).any() or per_row.sum() != given:
        raise UserError(
            f"{counts.sum()} image tokens do not match {given} images of {visual_tokens} tokens"
        )
    image = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32)
    kind = np.where(valid, np.where(is_image, TokenKind.IMAGE, TokenKind.QUESTION), TokenKind.PAD)
    zeros = np.zeros_like(ids)
    layout = TokenLayout(
        kind=kind.astype(np.int32),
        image=image,
        position=np.where(valid, np.cumsum(valid, axis=1) - 1, 0).astype(np.int32),
        document=zeros,
        branch=zeros,
        visual_tokens=visual_tokens,
    )
    if pixels is None or not given:
        return Batch(ids, layout)
    pixels = pixels.transpose(0, 2, 3, 1)
    rows = np.zeros((len(ids), per_row.max(), *pixels.shape[1:]), np.float32)
    first = np.cumsum(per_row) - per_row
    for row, (start, count) in enumerate(zip(first, per_row, strict=True)):
        rows[row, :count] = pixels[start : start + count]
    return Batch(jnp.asarray(ids), layout, jnp.asarray(rows))
