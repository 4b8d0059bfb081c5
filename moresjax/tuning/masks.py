"""Masks of selected tokens in the LLM, after the connector and in the vision encoder.

Axis legend: B rows, S tokens, P virtual tokens or patches, V visual tokens.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moresjax.core.layout import SHARED, Batch, TokenKind, TokenLayout
from moresjax.core.types import AnyArray
from moresjax.tuning.base import ModelConfig
from moresjax.tuning.selectors import Selector, marked_tokens


def extend_layout(
    layout: TokenLayout, count: int, present: Bool[AnyArray, "B P"] | None = None
) -> TokenLayout:
    """The layout with `count` virtual tokens in front, seen by every document of the row.

    Args:
      layout: The layout without them.
      count: P.
      present: The ones that a row has; the others are padding. Default: all.
    """
    if not count:
        return layout

    def pad(field: AnyArray, value: int) -> Int[Array, "B PS"]:
        return jnp.pad(jnp.asarray(field), ((0, 0), (count, 0)), constant_values=value)

    kind = pad(layout.kind, int(TokenKind.SYSTEM))
    first = jnp.broadcast_to(jnp.arange(count), (layout.shape[0], count))
    own: int | Array = count
    if present is not None:
        present = jnp.asarray(present)
        kind = kind.at[:, :count].set(jnp.where(present, kind[:, :count], int(TokenKind.PAD)))
        first = jnp.where(present, jnp.cumsum(present, axis=1) - 1, 0)
        own = present.sum(axis=1, keepdims=True)
    return layout.replace(
        kind=kind,
        image=pad(layout.image, -1),
        position=jnp.concatenate([first, jnp.asarray(layout.position) + own], axis=1),
        document=pad(layout.document, SHARED),
        branch=pad(layout.branch, 0),
    )


def patch_tokens(vision: Any, tokens: Int[np.ndarray, " F"]) -> Int[np.ndarray, " P"]:
    """The visual token that each patch of an image becomes; -1 for one that is left out.

    Args:
      vision: The configuration of the vision encoder.
      tokens: The visual token that each visual feature becomes.
    """
    # Features are the class token, if it is kept, and the patches.
    feature = np.arange(vision.num_patches) + int(vision.class_token) - vision.first_feature
    return np.where(feature >= 0, tokens[np.maximum(feature, 0)], -1)


class SiteMasks:
    """Masks of selected tokens at each tower, computed once per selector."""

    def __init__(
        self,
        batch: Batch,
        config: ModelConfig,
        num_extra: dict[str, int],
        present: Bool[Array, "B P"] | None,
        words: dict[str, tuple[int, ...]],
        marks: tuple[str, ...],
        cut: Callable[[Array], Array] | None,
        *,
        unfinished: bool,
        decoding: bool,
    ) -> None:
        self._batch, self._config, self._num_extra, self._words = batch, config, num_extra, words
        # Of all virtual tokens of the LLM the last are those that are tokens.
        count = num_extra["llm"]
        self._present = present[:, -count:] if present is not None and count else None
        self._cut, self._unfinished = cut or (lambda mask: mask), unfinished
        self._marks, self._decoding = marks, decoding
        self._known: dict[tuple[str, str], Bool[Array, "B S"]] = {}

    def __call__(self, site: str, selector: Selector) -> Bool[Array, "B S"]:
        """The tokens that a selector means at a site."""
        tower = site.split(".")[0]
        if (tower, selector.text) not in self._known:
            self._known[tower, selector.text] = self._mask(tower, selector)
        return self._known[tower, selector.text]

    def _mask(self, tower: str, selector: Selector) -> Bool[Array, "B S"]:
        batch, config = self._batch, self._config
        if tower == "llm":
            count = self._num_extra["llm"]
            tokens = jnp.pad(jnp.asarray(batch.tokens), ((0, 0), (count, 0)), constant_values=-1)
            layout = extend_layout(batch.layout, count, self._present)
            roi, marks = batch.roi, batch.marks
            if self._decoding and selector.uses_roi:  # what is generated lies in no image
                roi = jnp.zeros((len(tokens), 1), bool)
            if self._decoding and selector.marks:  # and is not marked
                marks = jnp.zeros_like(batch.tokens)
            if marks is not None:
                marks = jnp.pad(jnp.asarray(marks), ((0, 0), (count, 0)))
            marked = marked_tokens(marks, self._marks)
            mask = selector(layout, tokens, roi, self._words, self._unfinished, marked)
            return self._cut(mask)
        assert batch.pixels is not None  # else nothing is attached outside the LLM
        rows, images = batch.pixels.shape[:2]
        if tower == "connector":
            layout = _feature_layout(rows, images, config.visual_tokens, 0)
            return selector(layout, roi=batch.roi)
        vision, roi = config.vision, None
        layout = _feature_layout(rows * images, 1, vision.num_patches, vision.prefix_tokens)
        if batch.roi is not None:
            # The encoder sees every image of a row as a row of its own.
            roi = jnp.asarray(batch.roi)[:, : images * config.visual_tokens]
            tokens = config.feature_tokens()
            assert tokens is not None  # else there is no region
            token = patch_tokens(vision, tokens)
            roi = roi.reshape(rows * images, -1)[:, np.maximum(token, 0)] & (token >= 0)
        return selector(extend_layout(layout, self._num_extra["vision"]), roi=roi)


def _feature_layout(rows: int, images: int, visual_tokens: int, extra: int) -> TokenLayout:
    """Layout of visual features, `extra` tokens (class token, registers) before each row's."""
    image = jnp.arange(-extra, images * visual_tokens)
    image = jnp.broadcast_to(jnp.maximum(image, -1), (rows, image.size))
    zeros = jnp.zeros_like(image)
    kind = jnp.where(image >= 0, int(TokenKind.IMAGE), int(TokenKind.SYSTEM))
    return TokenLayout(kind, image, zeros, zeros, zeros, visual_tokens)
