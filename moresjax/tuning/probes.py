"""Probes: read-only statistics of a forward pass, and what they are told about its tokens.

Axis legend: B rows, N images or query heads, A query heads, T all queries, Q chosen queries, S
keys, H head features, C key groups, G new tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import LazyMask, TokenLayout
from moresjax.core.types import AnyArray, pytree_dataclass


@pytree_dataclass
class ProbeContext:
    """What a probe may know about the tokens besides the tensors it reads.

    Attributes:
      kind: kind of every key, `[B, S]`.
      mask: which keys each chosen query sees, `[B, Q, S]`; None where no probe reads attention.
      queries: row index of each chosen query, `[B, Q]`; None when the pass has only chosen queries.
      images: which of the images that a row has place for are there, `[B, N]`; None without any.
      patches: the patches of an image, the last tokens of the vision encoder (static).
      softcap: the soft cap on the attention logits; 0: none (static).
      layout: the layout of the keys.
      roi: the region of interest over each row's visual tokens, `[B, R]`; None without one.
      seen: which keys each chosen query sees, where the pass has no mask of all pairs: then `mask`
        is None unless a probe needs it.
      masses: attention of all queries on the groups of `Probe.members`, `[B, A, T, C]`, where the
        main pass of attention gives it.
      view: what the main pass of attention takes instead of a mask, where it takes something else.
    """

    kind: Int[Array, "B S"]
    mask: Bool[Array, "B Q S"] | None
    queries: Int[Array, "B Q"] | None
    images: Bool[Array, "B N"] | None = None
    patches: int = dataclasses.field(default=0, metadata={"static": True})
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})
    layout: TokenLayout | None = None
    roi: Bool[AnyArray, "B R"] | None = None
    seen: LazyMask | None = None
    masses: Float[Array, "B A T C"] | None = None
    view: Any = None

    def at_queries(self, x: Float[Array, "B N S H"]) -> Float[Array, "B N Q H"]:
        """What there is for every token, at the chosen queries."""
        if self.queries is None:
            return x
        return jnp.take_along_axis(x, self.queries[:, None, :, None], axis=2)

    def visible(self) -> Bool[Array, "B Q S"] | LazyMask:
        """What the chosen queries see: the mask, or what it is worked out from."""
        found = self.mask if self.seen is None else self.seen
        assert found is not None  # because attention is read
        return found


@pytree_dataclass
class ChosenToken:
    """The token that each row has just been given, as probes are told.

    Attributes:
      ids: the tokens `[B]`; meaningless in rows that have ended before.
      number: how many new tokens each row had before this one `[B]`.
      alive: whether the row had not ended before `[B]`.
      ends: whether it is an end token `[B]`.
      most: G, the most new tokens of a row (static).
    """

    ids: Int[Array, " B"]
    number: Int[Array, " B"]
    alive: Bool[Array, " B"]
    ends: Bool[Array, " B"]
    most: int = dataclasses.field(metadata={"static": True})


@runtime_checkable
class Probe(Protocol):
    """Read-only: returns reduced statistics of one layer, stacked over layers by the framework.

    A probe may also have:

      `layers`: the numbers of the layers that it reads, in order; default: all.
      `fold(total, new, token)`: what generation accumulates. `total` is what the queries so far
        gave, None at the first; `new` is what `read` gave for the query that the `ChosenToken` was
        chosen at; leaves of both have leading axes `[L, B]`, or `[1, B]`. Default: the sum.
      `members(context)`: a probe of attention says which of C groups each key belongs to,
        `[B, S, C]`, and gets the context's `masses` where attention itself can give them: for all
        queries, without a map of all pairs.
      `lazy`: whether a probe of attention does without the context's `mask`, reading `visible()`;
        default: False.
      `at_queries`: whether `read` looks at nothing but the context's queries, so that the last
        layer is computed there only; default: False.
    """

    @property
    def name(self) -> str:
        """The key of the statistics in the output."""
        ...

    @property
    def site(self) -> str:
        """`attn` (tensors `q`, `k`), `out` of the LLM's blocks, or a site of an edit (tensor `h`).

        What it reads is what edits have left.
        """
        ...

    @property
    def read(self) -> Callable[..., Any]:
        """`read(context, **tensors)`, with a `ProbeContext`: statistics of one layer."""
        ...


def probe_layers(probe: Probe) -> tuple[int, ...] | None:
    """The layers that a probe reads; None: all of them."""
    return getattr(probe, "layers", None)


def probe_members(probe: Probe) -> Callable[[ProbeContext], Float[Array, "B S C"]] | None:
    """What says which groups of keys a probe of attention reads; None where none does."""
    return getattr(probe, "members", None) if reads_attention(probe) else None


def needs_mask(probe: Probe) -> bool:
    """Whether a probe of attention needs the mask of its queries and all keys."""
    return reads_attention(probe) and not getattr(probe, "lazy", False)


def reads_attention(probe: Probe) -> bool:
    """Whether a probe reads queries and keys."""
    return probe.site == "attn"


def reads_images(probe: Probe) -> bool:
    """Whether a probe reads what is made of the images, before the LLM."""
    return probe.site.startswith(("vision.", "connector."))
