"""The token layout: what every token of a batch *is*, said once.

Axis legend: B rows, S tokens per row, Q queries, V visual tokens per image.

The data pipeline emits expanded sequences (one entry per visual token) of static shape together
with one `TokenLayout`. Everything that depends on where a token stands is derived from it by the
pure functions below: attention masks, loss masks, steering masks (`moresjax.tuning.selectors`) and
the key groups of the attention statistics.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.types import AnyArray, pytree_dataclass


class TokenKind(enum.IntEnum):
    """What a token is for. The four non-padding values are the key groups of every statistic."""

    PAD = 0
    SYSTEM = 1  # BOS, system prompt and the first role marker
    IMAGE = 2
    QUESTION = 3  # user text and the role marker that asks for the answer
    ANSWER = 4  # what the model is trained to say, or has said


class RowStructure(enum.Enum):
    """A static guarantee about every row; it decides which attention kernels may run."""

    ANY = "any"
    PACKED = "packed"  # documents without branches, each an unbroken run of tokens
    SINGLE = "single"  # one document without branches, padded on the right only


# Document number of tokens that every document of the row sees (learned prompt tokens).
SHARED = -1

IntField = Int[AnyArray, "B S"]

# The arrays of a layout.
LAYOUT_FIELDS = ("kind", "image", "position", "document", "branch")


@pytree_dataclass
class TokenLayout:
    """Per-token integers of a batch, all `[B, S]`.

    Attributes:
      kind: A `TokenKind` value.
      image: For a visual token its place among the row's visual tokens,
        `image_number * visual_tokens + token_number`; -1 for every other token.
      position: The rotary position; counts from 0 in every document, padding excluded.
      document: The number of the packed document; tokens of different documents never see each
        other, except that all of them see `SHARED` tokens.
      branch: 0 for the trunk of a document, which all of its later tokens see; k > 0 for the k-th
        of several continuations that share the trunk but not each other (many questions on one
        image).
      visual_tokens: V, the number of visual tokens of one image (static).
      whole_images: Whether the tokens of an image also see those of it that stand after them; said
        by the model that reads the batch (static).
    """

    kind: IntField
    image: IntField
    position: IntField
    document: IntField
    branch: IntField
    visual_tokens: int = dataclasses.field(default=0, metadata={"static": True})
    whole_images: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and tokens, `(B, S)`."""
        return self.kind.shape

    def replace(self, **changes: Any) -> "TokenLayout":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def stacked(cls, fields: Mapping[str, AnyArray], visual_tokens: int = 0) -> "TokenLayout":
        """The layout of stacked rows, given as arrays `[B, S]` by name; other names are ignored."""
        return cls(*(fields[name] for name in LAYOUT_FIELDS), visual_tokens=visual_tokens)

    @classmethod
    def text(
        cls, valid: Bool[AnyArray, "B S"], kind: TokenKind = TokenKind.QUESTION
    ) -> "TokenLayout":
        """Layout of plain text rows, padded on either side, one document each.

        >>> layout = TokenLayout.text(np.array([[True, True, False]]))
        >>> layout.position.tolist()
        [[0, 1, 0]]

        Args:
          valid: Is False where a row has padding.
          kind: Says what the tokens of the text are for.
        """
        valid = jnp.asarray(valid)
        zeros = jnp.zeros(valid.shape, jnp.int32)
        return cls(
            kind=jnp.where(valid, int(kind), int(TokenKind.PAD)),
            image=zeros - 1,
            position=jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, 0),
            document=zeros,
            branch=zeros,
        )

    @classmethod
    def of_step(
        cls,
        kind: Int[AnyArray, " B"],
        position: Int[AnyArray, " B"],
        document: Int[AnyArray, " B"],
        visual_tokens: int = 0,
    ) -> "TokenLayout":
        """Layout `[B, 1]` of the one text token that every row reads in a decode step."""
        zeros = jnp.zeros_like(position)
        fields = {
            "kind": kind,
            "image": zeros - 1,
            "position": position,
            "document": document,
            "branch": zeros,
        }
        fields = {name: x[:, None].astype(jnp.int32) for name, x in fields.items()}
        return cls(**fields, visual_tokens=visual_tokens)


def infer_structure(layout: TokenLayout) -> RowStructure:
    """The strongest guarantee that a layout on the host is seen to keep: `SINGLE` or `ANY`."""
    padding = np.asarray(layout.kind) == TokenKind.PAD
    single = not (np.any(layout.document) or np.any(layout.branch))
    return (
        RowStructure.SINGLE
        if single and (padding[:, 1:] >= padding[:, :-1]).all()
        else RowStructure.ANY
    )


def valid_mask(layout: TokenLayout) -> Bool[Array, "B S"]:
    """Tokens that are not padding."""
    return jnp.asarray(layout.kind) != TokenKind.PAD


def count_documents(layout: TokenLayout) -> Int[Array, ""]:
    """How many documents all rows hold together; padding is none."""
    valid, document = valid_mask(layout), jnp.asarray(layout.document)
    goes_on = valid[:, :-1] & (document[:, 1:] == document[:, :-1])
    return (valid & ~jnp.pad(goes_on, ((0, 0), (1, 0)))).sum()


def visible(
    layout: TokenLayout,
    queries: Int[AnyArray, "B Q"] | None = None,
) -> Bool[Array, "B Q S"]:
    """Which keys the tokens at row indices `queries` (default: all) attend to.

    A key is visible when it is not padding, stands at or before the query in the row, belongs to
    the query's document (or to all of them), and lies in the trunk or in the query's own branch.
    With `whole_images` those of the query's image are visible, too, that stand after it. A
    padding query sees only itself, so that its softmax stays finite; nothing ever reads its output.

    >>> row = TokenLayout.text(np.ones((1, 3), bool)).replace(image=np.array([[-1, 0, 1]]))
    >>> visible(row.replace(visual_tokens=2, whole_images=True)).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 1], [1, 1, 1]]]
    """
    batch, length = layout.shape
    index = jnp.arange(length)
    if queries is None:
        queries = jnp.broadcast_to(index, (batch, length))
    queries = jnp.asarray(queries)

    def at_queries(field: AnyArray) -> Int[Array, "B Q 1"]:
        return jnp.take_along_axis(jnp.asarray(field), queries, axis=1)[:, :, None]

    kind, document, branch = (
        jnp.asarray(f)[:, None, :] for f in (layout.kind, layout.document, layout.branch)
    )
    own = index[None, None, :] == queries[:, :, None]
    causal = index[None, None, :] <= queries[:, :, None]
    if layout.whole_images and layout.visual_tokens:
        place = jnp.asarray(layout.image)
        number = jnp.where(place >= 0, place // layout.visual_tokens, -1)
        causal |= (number[:, None, :] == at_queries(number)) & (number >= 0)[:, None, :]
    related = (document == SHARED) | (
        (document == at_queries(layout.document))
        & ((branch == 0) | (branch == at_queries(layout.branch)))
    )
    alive = (kind != TokenKind.PAD) & (at_queries(layout.kind) != TokenKind.PAD)
    return (causal & related & alive) | own


@pytree_dataclass
class LazyMask:
    """Which keys queries see, worked out for some queries at a time: never for all pairs at once.

    Attributes:
      layout: The layout of the keys `[B, S]`.
      queries: The column of every query among the keys `[B, Q]`.
      window: A query sees only keys less than so many positions before it; 0: all (static).
      local: Whether this layer has the window, where only a number in a scan tells; None: it has.
    """

    layout: TokenLayout
    queries: Int[AnyArray, "B Q"]
    window: int = dataclasses.field(default=0, metadata={"static": True})
    local: Bool[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, queries and keys, as those of the mask."""
        return *self.queries.shape, self.layout.shape[1]

    def at(self, queries: Int[AnyArray, "B Q"]) -> Bool[Array, "B Q S"]:
        """The mask of the queries in these columns."""
        mask = visible(self.layout, queries)
        if not self.window:
            return mask
        position = jnp.asarray(self.layout.position)
        own = jnp.take_along_axis(position, jnp.asarray(queries), axis=1)
        near = own[:, :, None] - position[:, None, :] < self.window
        return mask & (near if self.local is None else near | ~self.local)

    def dense(self) -> Bool[Array, "B Q S"]:
        """The whole mask."""
        return self.at(self.queries)


def _next(layout: TokenLayout) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """TokenKind of the next token, and whether it continues the same document and branch."""
    kind, document, branch = (jnp.asarray(f) for f in (layout.kind, layout.document, layout.branch))

    def shifted(field: Array, fill: int) -> Int[Array, "B S"]:
        return jnp.pad(field[:, 1:], ((0, 0), (0, 1)), constant_values=fill)

    following = shifted(kind, int(TokenKind.PAD))
    same_document = document == shifted(document, -1)
    # The trunk goes on in its first branch; a branch ends where its number does.
    same_branch = (branch == 0) | (branch == shifted(branch, -1))
    goes_on = (kind != TokenKind.PAD) & (following != TokenKind.PAD) & same_document & same_branch
    return following, goes_on


def loss_mask(layout: TokenLayout) -> Bool[Array, "B S"]:
    """Tokens whose *next* token is an answer token of the same document and branch."""
    following, goes_on = _next(layout)
    return goes_on & (following == TokenKind.ANSWER)


def last_prompt_mask(layout: TokenLayout, unfinished: bool = False) -> Bool[Array, "B S"]:
    """Prompt tokens that predict the first token of an answer.

    These are the last one before each answer and, where no answer follows (generation), the last
    one of its document and branch.

    Args:
      layout: The layout of the batch.
      unfinished: Whether more of the prompt follows the last token of every row.
    """
    kind = jnp.asarray(layout.kind)
    following, goes_on = _next(layout)
    prompt = (kind != TokenKind.PAD) & (kind != TokenKind.ANSWER)
    ends = ~goes_on
    if unfinished:
        ends &= following != TokenKind.PAD
    return prompt & (ends | (following == TokenKind.ANSWER))


def rank_in_conversation(
    layout: TokenLayout, region: Bool[AnyArray, "B S"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """How many tokens of `region` stand before and after each token of its conversation.

    For a token of a branch these are its trunk and the branch, so the numbers are those that the
    same tokens have alone in a row. A token of the trunk counts the longest of its branches behind
    it. For a token inside the region the two add up to the size of the region minus one.
    """
    document, branch = jnp.asarray(layout.document), jnp.asarray(layout.branch)
    region = jnp.asarray(region).astype(jnp.int32)
    other_document = document[:, 1:] != document[:, :-1]
    other_branch = other_document | (branch[:, 1:] != branch[:, :-1])
    edge = jnp.ones((document.shape[0], 1), bool)

    def preceding(counted: Int[Array, "B S"], border: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        before, first = jnp.cumsum(counted, axis=1) - counted, jnp.concatenate([edge, border], 1)
        # `before` never falls, so its running maximum over run starts is the count at the
        # own start.
        return before - jax.lax.cummax(jnp.where(first, before, 0), axis=1)

    def following(counted: Int[Array, "B S"], border: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        return preceding(counted[:, ::-1], border[:, ::-1])[:, ::-1]

    trunk = branch == 0
    in_trunk = preceding(jnp.where(trunk, region, 0), other_document)
    in_branch, after = preceding(region, other_branch), following(region, other_branch)
    before = in_trunk + jnp.where(trunk, 0, in_branch)
    # The largest branch of every document: a running maximum from the right, in which a document
    # outweighs all those behind it.
    length = document.shape[1] + 1
    borders = jnp.pad(other_document.astype(jnp.int32), ((0, 0), (0, 1)))
    number = jnp.cumsum(borders[:, ::-1], axis=1)[:, ::-1]
    sizes = jnp.where(trunk, 0, in_branch + region + after)
    largest = jax.lax.cummax(number * length + sizes, axis=1, reverse=True) - number * length
    return before, after + jnp.where(trunk, largest, 0)


@pytree_dataclass
class Batch:
    """What the data pipeline emits and every model call takes.

    Attributes:
      tokens: token ids `[B, S]`; the id under a visual token is never read.
      layout: what each token is.
      pixels: normalised images `[B, N, height, width, 3]`, N per row (unused ones are zero), or
        None: then the vision encoder is not run at all.
      roi: region of interest over each row's visual tokens `[B, N * V]`, or None; a batch without
        pixels may have it, too.
      marks: for each token the bits of the marks that it belongs to `[B, S]`, or None.
      adapter: number of each row's adapter where several are loaded `[B]`, -1 for the base model;
        None: the base model for all rows.
      structure: a guarantee about every row (static); decides which attention kernels may run.
    """

    tokens: IntField
    layout: TokenLayout
    pixels: Float[AnyArray, "B N Y X 3"] | None = None
    roi: Bool[AnyArray, "B R"] | None = None
    adapter: Int[AnyArray, " B"] | None = None
    structure: RowStructure = dataclasses.field(default=RowStructure.ANY, metadata={"static": True})
    marks: IntField | None = None
