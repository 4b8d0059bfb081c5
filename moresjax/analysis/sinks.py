"""Attention sinks: tokens that get much attention and give little.

Axis legend: L layers, S tokens, D features, G queries, J sink dimensions.

The rule is that of "See What You Are Told" (arXiv 2503.03321): a sink token has a massive
activation in some few dimensions that are the LLM's own. With x the input of a layer, a token is a
sink there if the largest |x_d| / rms(x) over the sink dimensions d is at least tau = 20. The paper
takes the dimensions from the base LLM (1415 and 2533 of LLaMA-2-7B); here they are those in which
the row's first token has such an activation in some layer, unless they are given. As |x_d| / rms(x)
cannot be over the root of D, a model of less than 400 features has no sinks by tau = 20.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from moresjax.core.layout import TokenKind
from moresjax.core.types import Ids
from moresjax.models.attention import GROUPS

TAU = 20.0
TEXT = (TokenKind.QUESTION, TokenKind.ANSWER)


@dataclasses.dataclass(frozen=True)
class SinkShares:
    """Attention of an answer with its sinks, and without them.

    Attributes:
      share: The attention on each group (system, image, question, answer) `[L, 4]`.
      share_without: The same with sinks left out and the rest scaled to 1.
      lmar: Mean attention per image token over that per token of question and answer `[L]`.
      lmar_without: The same without sinks; nan where no image or text token is left.
      sink_share: The attention on visual and on all other sinks `[L, 2]`.
    """

    share: Float[np.ndarray, "L 4"]
    share_without: Float[np.ndarray, "L 4"]
    lmar: Float[np.ndarray, " L"]
    lmar_without: Float[np.ndarray, " L"]
    sink_share: Float[np.ndarray, "L 2"]


def sink_values(
    states: Float[np.ndarray, "L S D"], dimensions: Sequence[int]
) -> Float[np.ndarray, "L S"]:
    """The largest |x_d| / rms(x) over the sink dimensions, for every layer and token.

    >>> sink_values(np.asarray([[[3.0, 0, 0, 0]]]), [0]).tolist()
    [[2.0]]
    """
    if not len(dimensions):
        return np.zeros(states.shape[:2])
    return _relative(states)[..., list(dimensions)].max(-1)


def sink_dimensions(states: Float[np.ndarray, "L S D"], tau: float = TAU) -> list[int]:
    """The dimensions in which the first token has a massive activation in some layer.

    Args:
      states: The inputs of all layers.
      tau: The least |x_d| / rms(x) of one.
    """
    return np.flatnonzero((_relative(states[:, 0]) >= tau).any(0)).tolist()


def _relative(states: Float[np.ndarray, "*L D"]) -> Float[np.ndarray, "*L D"]:
    wide = np.abs(states.astype(np.float64))
    return wide / np.maximum(np.sqrt(np.square(wide).mean(-1, keepdims=True)), 1e-12)


def sink_shares(
    attention: Float[np.ndarray, "L G S"],
    kind: Ids,
    visible: Bool[np.ndarray, "G S"],
    sinks: Bool[np.ndarray, "L S"],
) -> SinkShares:
    """Share and LMAR of the queries of an answer, with and without sinks.

    Args:
      attention: Of each query on each token, mean over heads.
      kind: The `TokenKind` of each token.
      visible: Which tokens each query sees.
      sinks: Which tokens are sinks in each layer.
    """
    groups = np.stack([np.isin(kind, [int(group)]) for group in GROUPS], -1).astype(float)  # [S, 4]
    text = np.isin(kind, [int(group) for group in TEXT])
    image = np.isin(kind, [int(TokenKind.IMAGE)])

    def share(mass: Float[np.ndarray, "L G S"]) -> Float[np.ndarray, "L 4"]:
        parts = mass @ groups
        whole = np.maximum(parts.sum(-1, keepdims=True), 1e-12)
        return (parts / whole).mean(1)

    def score(kept: Bool[np.ndarray, "L S"], members: Bool[np.ndarray, " S"]) -> np.ndarray:
        counted = (kept & members)[:, None] & visible  # [L, G, S]
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((attention * counted).sum(-1) / counted.sum(-1)).mean(1)

    def ratio(kept: Bool[np.ndarray, "L S"]) -> Float[np.ndarray, " L"]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return score(kept, image) / score(kept, text)

    of_sinks = [(attention * (sinks & own)[:, None]).sum(-1).mean(1) for own in (image, ~image)]
    return SinkShares(
        share(attention),
        share(attention * ~sinks[:, None]),
        ratio(np.ones_like(sinks)),
        ratio(~sinks),
        np.stack(of_sinks, -1),
    )
