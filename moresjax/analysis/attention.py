"""Attention statistics: group masses, share and LMAR.

Axis legend: L layers, B samples, N heads, Q queries, S keys, C = 4 key groups (`GROUPS`: system,
image, question, answer).

The query of a generated token is the position whose logits gave it. With a(k) its attention
averaged over heads, `mass` on a group is the sum of a(k) over the group's keys and `score` is the
mean over its visible keys. Source: LLaVA Steering, figures 1 and 2, equation 2.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moresjax.core.errors import UserError
from moresjax.core.layout import LazyMask, TokenKind
from moresjax.core.types import Ids
from moresjax.models.attention import GROUPS, attention_probabilities, in_chunks
from moresjax.models.connector import neighbours, parse_connector, pooled_side
from moresjax.models.fused_attention import Runs
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.group_attention import group_counts, group_masses, key_sums, one_hot
from moresjax.models.mllm import MLLMConfig
from moresjax.tuning.probes import ProbeContext

IMAGE = GROUPS.index(TokenKind.IMAGE)
# What the image is compared with; the first is the default (the paper does not say).
TEXT_VARIANTS = {
    "text": (TokenKind.QUESTION, TokenKind.ANSWER),
    "question": (TokenKind.QUESTION,),
    "all_nonvisual": (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER),
}


@dataclasses.dataclass(frozen=True)
class AttentionProbe:
    """Group masses and key counts of the chosen queries; never an S x S map.

    Reads `mass` `[B, N, C]` (summed over the queries of a row) and, for each text variant and the
    image, `score` `[B, N, 1 + variants]`, the mean attention per visible key (0 without any). With
    `by_query` both have an axis Q behind N, and nothing is summed.
    """

    name: str = "attention"
    site: str = "attn"
    by_query: bool = False
    lazy = True

    def members(self, context: ProbeContext) -> Float[Array, "B T C"]:
        """Which of `GROUPS` each key belongs to."""
        return (context.kind[:, :, None] == jnp.asarray(GROUPS)).astype(jnp.float32)

    def read(
        self, context: ProbeContext, q: Float[Array, "B N S H"], k: Float[Array, "B K T H"]
    ) -> dict[str, Float[Array, "..."]]:
        """Statistics of one layer from its queries and keys."""
        members = self.members(context)
        masses = masses_of(members, context, q, k)  # [B, N, Q, C]
        counts = group_counts(members, context.visible())[:, None]

        def mean(groups: Sequence[TokenKind]) -> Float[Array, "B N Q"]:
            chosen = np.asarray([group in groups for group in GROUPS], np.float32)
            return (masses * chosen).sum(-1) / jnp.maximum((counts * chosen).sum(-1), 1)

        scores = [mean((TokenKind.IMAGE,)), *(mean(groups) for groups in TEXT_VARIANTS.values())]
        score = jnp.stack(scores, axis=-1)
        if self.by_query:
            return {"mass": masses, "score": score}
        return {"mass": masses.sum(2), "score": score.sum(2)}


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Full attention of the chosen queries. Only on request.

    Reads `[B, Q, S]`, averaged over heads, or `[B, N, Q, S]` with `by_head`.
    """

    name: str = "maps"
    site: str = "attn"
    by_head: bool = False
    lazy = True

    def read(
        self, context: ProbeContext, q: Float[Array, "B N S H"], k: Float[Array, "B K T H"]
    ) -> Float[Array, "B *N Q T"]:
        """The map of one layer from its queries and keys."""
        mask = context.visible()

        def maps(q: Array, mask: Array) -> Array:
            found = attention_probabilities(q, k, mask, context.softcap)
            return found if self.by_head else found.mean(axis=1, keepdims=True)

        q = context.at_queries(q)
        found = in_chunks(maps, q, mask) if isinstance(mask, LazyMask) else maps(q, mask)
        return found if self.by_head else found[:, 0]


@dataclasses.dataclass(frozen=True)
class GroupProbe:
    """Attention mass of groups of keys of your own, such as images or regions of them.

    Reads `[B, N, C]`, summed over the queries of a row, or `[B, N, Q, C]` with `by_query`. Like
    `AttentionProbe` it costs memory in proportion to the keys, whatever kernel attends.

    >>> import jax.numpy as jnp
    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> batch = model.service.batch([model.prompt("how many ?")], 8)
    >>> halves = GroupProbe(lambda context: jnp.arange(context.kind.shape[1])[None] // 4, 2)
    >>> model.mllm(batch, probes=(halves,), queries=jnp.array([[3]])).stats["groups"].shape
    (2, 1, 4, 2)

    Attributes:
      number: Gives the number of every key's group from the context, `[B, S]`, or `[1, S]` for all
        rows; a key of another number belongs to none. `by_image` and `by_roi` are such functions.
      groups: C.
      name: The key of the statistics.
      by_query: Whether the queries are kept apart.
    """

    number: Callable[[ProbeContext], Int[Array, "_ S"]]
    groups: int
    name: str = "groups"
    site: str = "attn"
    by_query: bool = False
    lazy = True

    def members(self, context: ProbeContext) -> Float[Array, "B T C"]:
        """Which group each key belongs to."""
        number = jnp.broadcast_to(self.number(context), context.kind.shape)
        return one_hot(number, self.groups)

    def read(
        self, context: ProbeContext, q: Float[Array, "B N S H"], k: Float[Array, "B K T H"]
    ) -> Float[Array, "B N *Q C"]:
        """The masses of one layer from its queries and keys."""
        masses = masses_of(self.members(context), context, q, k)
        return masses if self.by_query else masses.sum(axis=2)


@dataclasses.dataclass(frozen=True)
class KeyProbe:
    """How much attention every key gets: column sums over the chosen queries of a row.

    Reads `[B, S]`, mean over heads, or `[B, N, S]` with `by_head`; over all queries of a kernel
    they come from its backward pass, and no array has all queries and all keys.

    >>> import jax.numpy as jnp
    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> batch = model.service.batch([model.prompt("how many ?")], 8)
    >>> sums = model.mllm(batch, probes=(KeyProbe(),), queries=jnp.array([[2, 3]])).stats["keys"]
    >>> sums.shape, round(float(sums[0, 0].sum()), 3)
    ((2, 1, 8), 2.0)
    """

    name: str = "keys"
    site: str = "attn"
    by_head: bool = False
    lazy = True

    def read(
        self, context: ProbeContext, q: Float[Array, "B N S H"], k: Float[Array, "B K T H"]
    ) -> Float[Array, "B *N T"]:
        """The sums of one layer from its queries and keys."""
        kind, mask = context.kind, context.visible()
        view = context.view
        if isinstance(view, Runs) and context.queries is None and not view.behind_cache:
            mask = view
        chosen = kind[:, -q.shape[2] :] != TokenKind.PAD  # of all queries: those that are tokens
        weights = chosen.astype(jnp.float32)
        if context.queries is not None:
            q = context.at_queries(q)
            weights = jnp.ones(context.queries.shape, jnp.float32)
        sums = key_sums(q, k.astype(q.dtype), weights, mask, context.softcap)
        return sums if self.by_head else sums.mean(axis=1)


def by_image(context: ProbeContext) -> Int[Array, "B S"]:
    """For `GroupProbe`: the number of the image that a key is a token of."""
    layout = context.layout
    assert layout is not None  # in every pass of the LLM
    return jnp.asarray(layout.image) // max(layout.visual_tokens, 1)


def by_roi(context: ProbeContext) -> Int[Array, "B S"]:
    """For `GroupProbe`: 0 for visual tokens in the region of interest, 1 for the others."""
    layout, roi = context.layout, context.roi
    if layout is None or roi is None:
        raise UserError("attention on a region of interest needs one: give roi=")
    image = jnp.asarray(layout.image)
    inside = jnp.take_along_axis(jnp.asarray(roi), jnp.maximum(image, 0), axis=1)
    return jnp.where(image < 0, -1, jnp.where(inside, 0, 1))


def masses_of(
    members: Float[Array, "B T C"],
    context: ProbeContext,
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K T H"],
) -> Float[Array, "B N Q C"]:
    """Masses of the chosen queries: those that attention itself gave, else read from the keys."""
    if context.masses is not None:
        return context.at_queries(context.masses)
    return group_masses(context.at_queries(q), k, members, context.visible(), context.softcap)


@dataclasses.dataclass(frozen=True)
class AttentionSummary:
    """Statistics of many samples.

    Attributes:
      share: attention on each group per layer, mean over tokens and samples `[L, C]`; every
        row sums to 1.
      share_by_head: the same for every head `[L, N, C]`.
      lmar: per text variant, the mean over samples of image score / text score per layer `[L]`.
      lmar_of_means: per text variant, the ratio of the two scores' means over samples `[L]`; unlike
        `lmar` it does not explode when a few samples hardly look at the text.
      samples: number of samples counted.
      excluded: samples without an image or without a generated token.
    """

    share: Float[np.ndarray, "L C"]
    share_by_head: Float[np.ndarray, "L N C"]
    lmar: dict[str, Float[np.ndarray, " L"]]
    lmar_of_means: dict[str, Float[np.ndarray, " L"]]
    samples: int
    excluded: int

    @property
    def average_visual_share(self) -> float:
        """Share of attention on the image, mean over layers."""
        return float(self.share[:, IMAGE].mean())

    def to_dict(self, *, by_head: bool = False) -> dict:
        """The statistics as JSON takes them.

        Args:
          by_head: Whether to add those of single heads, `[L, N, C]` numbers.
        """
        names = [group.name.lower() for group in GROUPS]
        return {
            "samples": self.samples,
            "excluded": self.excluded,
            "groups": names,
            "share": self.share.tolist(),
            "average_visual_share": self.average_visual_share,
            "lmar": {name: x.tolist() for name, x in self.lmar.items()},
            "lmar_of_means": {name: x.tolist() for name, x in self.lmar_of_means.items()},
            **({"share_by_head": self.share_by_head.tolist()} if by_head else {}),
        }


@dataclasses.dataclass(frozen=True)
class AnswerAttention:
    """What one answer looked at.

    Attributes:
      mass: The masses of `AttentionProbe`, summed over the answer's tokens `[L, N, C]`.
      score: Its scores, mean over tokens and heads `[L, 1 + variants]`.
      tokens: The generated tokens, the end token included `[G]`.
      has_image: Whether the question has an image.
    """

    mass: Float[np.ndarray, "L N C"]
    score: Float[np.ndarray, "L _"]
    tokens: Ids
    has_image: bool

    @classmethod
    def of(cls, stats: Mapping[str, np.ndarray], tokens: Ids, has_image: bool) -> "AnswerAttention":
        """The statistics of a row, summed over its tokens, as a completion has them."""
        score = (stats["score"] / np.array([max(len(tokens), 1)])).mean(axis=1)
        return cls(np.asarray(stats["mass"]), score, tokens, has_image)

    @property
    def visual_share(self) -> float:
        """Share of the answer's attention on the image, mean over layers and heads."""
        return float(self.mass[..., IMAGE].mean()) / max(len(self.tokens), 1)


def summarize(
    mass: Float[np.ndarray, "L B N C"],
    score: Float[np.ndarray, "L B N _"],
    tokens: np.ndarray,
    has_image: np.ndarray,
) -> AttentionSummary:
    """Share and LMAR from sums over each sample's tokens.

    One layer, one sample with two generated tokens, one head: both tokens look at the image with
    half of their attention, and at one of its tokens three times as long as at a text token.

    >>> mass = np.array([0.2, 1.0, 0.6, 0.2]).reshape(1, 1, 1, 4)
    >>> score = np.array([0.3, 0.1, 0.1, 0.1]).reshape(1, 1, 1, 4)
    >>> summary = summarize(mass, score, tokens=np.array([2]), has_image=np.array([True]))
    >>> summary.average_visual_share
    0.5
    >>> round(float(summary.lmar["text"][0]), 3)
    3.0

    Args:
      mass: The masses of `AttentionProbe`, summed over each sample's queries.
      score: The scores of `AttentionProbe`, summed over each sample's queries.
      tokens: The number of generated tokens of each sample.
      has_image: Whether each sample has an image.
    """
    kept = np.asarray(has_image) & (np.asarray(tokens) > 0)
    count = np.asarray(tokens)[kept][None, :, None, None]
    mass, score = np.asarray(mass)[:, kept] / count, np.asarray(score)[:, kept] / count
    return _summary(mass, score.mean(axis=2), int((~kept).sum()))


def summarize_answers(answers: Sequence[AnswerAttention]) -> AttentionSummary | None:
    """`summarize` for single answers; None where none of them has an image and a token."""
    kept = [answer for answer in answers if answer.has_image and len(answer.tokens)]
    if not kept:
        return None
    count = np.array([len(answer.tokens) for answer in kept])[None, :, None, None]
    mass = np.stack([answer.mass for answer in kept], 1) / count
    score = np.stack([answer.score for answer in kept], 1)
    return _summary(mass, score, len(answers) - len(kept))


def _summary(
    mass: Float[np.ndarray, "L B N C"], score: Float[np.ndarray, "L B _"], excluded: int
) -> AttentionSummary:
    """Means over samples of what are means over each sample's tokens."""
    image, texts = score[..., 0], score[..., 1:]
    ratios, of_means = {}, {}
    for number, name in enumerate(TEXT_VARIANTS):
        text = texts[..., number]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[name] = (image / text).mean(axis=1)
            of_means[name] = image.mean(axis=1) / text.mean(axis=1)
    return AttentionSummary(
        share=mass.mean(axis=(1, 2)),
        share_by_head=mass.mean(axis=1),
        lmar=ratios,
        lmar_of_means=of_means,
        samples=mass.shape[1],
        excluded=excluded,
    )


def to_grid(values: Float[np.ndarray, "*L V"], config: MLLMConfig) -> Float[np.ndarray, "*L Y X"]:
    """Values of one image's visual tokens on the patch grid; nan where a patch has no token.

    >>> from moresjax.models.zoo import mllm_config
    >>> to_grid(np.arange(576.0), mllm_config("llava-1.5-7b")).shape
    (24, 24)

    Interleaved encoders have two tokens per patch, whose values are added. A connector that joins
    neighbours (`concat4-linear`) has a token for so many patches of a row: MiniGPT-v2's 256 tokens
    are 32 rows of 8. One that takes the mean of squares (`pool4-linear`) has a token for each.

    Raises:
      UserError: for a connector whose tokens have no place on the image, for a model that reads no
        images, and for another number of values than an image has tokens.
    """
    vision = config.vision
    if vision is None:
        raise UserError("a model without a vision encoder has no visual tokens")
    if parse_connector(config.connector)[1] is not None:
        raise UserError(
            f"tokens of connector {config.connector} come from learned queries, not from places "
            "on the image"
        )
    if values.shape[-1] != config.visual_tokens:
        raise UserError(
            f"an image has {config.visual_tokens} visual tokens, got {values.shape[-1]} values; "
            "the tokens of several images go to one grid each"
        )
    if (square := pooled_side(config.connector)) > 1:
        side = math.isqrt(vision.num_tokens) // square
        return values.reshape(*values.shape[:-1], side, side)
    if neighbours(config.connector) > 1:
        return _grid_of_joined(values, config)
    if isinstance(vision, FusedVisionConfig):
        if vision.fusion == "interleave":
            values = values.reshape(*values.shape[:-1], -1, 2).sum(-1)
        vision = vision.encoders[0]
    side = vision.image_size // vision.patch_size
    grid = np.full((*values.shape[:-1], side * side), np.nan)
    classes = int(vision.class_token and vision.first_feature == 0)
    first = 0 if vision.class_token else vision.first_feature
    grid[..., first:] = values[..., classes:]
    return grid.reshape(*values.shape[:-1], side, side)


def _grid_of_joined(
    values: Float[np.ndarray, "*L V"], config: MLLMConfig
) -> Float[np.ndarray, "*L Y X"]:
    """Values of tokens that stand for several patches of a row each."""
    vision, features = config.vision, 1
    if isinstance(vision, FusedVisionConfig):
        features = 2 if vision.fusion == "interleave" else 1
        vision = vision.encoders[0]
    assert vision is not None
    side = vision.image_size // vision.patch_size
    if vision.num_tokens != side * side or side * features % neighbours(config.connector):
        raise UserError(
            f"tokens of connector {config.connector} have no places on the image: they go over the "
            f"ends of its {side} rows of patches"
        )
    return values.reshape(*values.shape[:-1], side, -1)


def image_grids(
    values: Float[np.ndarray, "*L NV"], images: int, config: MLLMConfig
) -> Float[np.ndarray, "N *L Y X"]:
    """`to_grid` of each of several images, whose tokens follow each other.

    Raises:
      UserError: As `to_grid`.
    """
    parts = np.split(values, images, axis=-1)
    return np.stack([to_grid(part, config) for part in parts])
