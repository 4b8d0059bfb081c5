"""The state of a generation, and how a token is added to it.

Axis legend: B rows, G new tokens, T cache length, L layers, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from moresjax.core.layout import TokenLayout
from moresjax.core.ops import write_at
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.generation.sampling import GREEDY, Sampling, choose
from moresjax.models.block import LayerCache


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What of a generation is compiled in.

    Attributes:
      eos: tokens that end a row.
      pad: what fills a row after its end.
      sampling: how tokens are chosen; its seed is not used.
      logprobs: whether the log-probabilities of the chosen tokens are kept.
    """

    eos: tuple[int, ...]
    pad: int
    sampling: Sampling = GREEDY
    logprobs: bool = False


@pytree_dataclass
class Rolling:
    """Where the rows of a batch stand whose rows come and go, each at its own time.

    Attributes:
      start: place of the first new token in the cache `[B]`.
      limit: of new tokens `[B]`.
    """

    start: Int[AnyArray, " B"]
    limit: Int[AnyArray, " B"]


@pytree_dataclass
class DecodeState:
    """State of the decode loop."""

    step: Int[AnyArray, "..."]  # new tokens so far; of each row where they are `rolling`
    tokens: Int[AnyArray, "B G"]
    done: Bool[AnyArray, " B"]
    length: Int[AnyArray, " B"]
    position: Int[AnyArray, " B"]  # of the last token
    document: Int[AnyArray, " B"]
    adapter: Int[AnyArray, " B"] | None
    keys: TokenLayout  # of the cache [B, T]
    caches: list[LayerCache]
    stats: dict
    rules: DecodeConfig = dataclasses.field(metadata={"static": True})
    seeds: UInt[AnyArray, " B"] | None = None  # when drawing
    seen: Bool[AnyArray, "B V"] | None = None  # tokens of the row, for the repetition penalty
    logprobs: Float[AnyArray, "B G"] | None = None
    rolling: Rolling | None = None
    left: Int[AnyArray, ""] | None = None  # steps to make, of rolling rows ..
    enough: Int[AnyArray, ""] | None = None  # .. unless so many of them have ended

    @property
    def index(self) -> Int[Array, "..."]:
        """Place of the last new token in the cache."""
        if self.rolling is None:
            return self.keys.shape[1] - self.tokens.shape[1] + self.step - 1
        return self.rolling.start + self.step - 1

    @property
    def last_token(self) -> Int[Array, "B 1"]:
        """The tokens chosen last."""
        if self.rolling is None:
            return jax.lax.dynamic_slice_in_dim(self.tokens, self.step - 1, 1, axis=1)
        return jnp.take_along_axis(self.tokens, self.step[:, None] - 1, axis=1)

    @property
    def goes_on(self) -> Bool[Array, ""]:
        """Whether there is a step to make."""
        if self.left is None:
            return (self.step < self.tokens.shape[1]) & ~self.done.all()
        return (self.left > 0) & (self.done.sum() < self.enough)

    def replace(self, **changes) -> "DecodeState":
        return dataclasses.replace(self, **changes)

    def append(self, logits: Float[Array, "B V"]) -> "DecodeState":
        """Chooses each row's next token and writes it down."""
        rules, rows = self.rules, jnp.arange(len(self.done))
        token = choose(logits, rules.sampling, self.seen, self.seeds, self.length)
        token = jnp.where(self.done, rules.pad, token).astype(jnp.int32)
        length = self.length + ~self.done
        done = self.done | jnp.isin(token, jnp.asarray(rules.eos))
        step = self.step + 1

        def write(buffer, column):
            if self.rolling is None:
                return write_at(buffer, column[:, None], self.step, 1)
            return buffer.at[rows, self.step].set(column, mode="drop")

        changes = {}
        if self.rolling is not None:
            step, done = length, done | (length >= self.rolling.limit)
        if self.left is not None:
            changes["left"] = self.left - 1
        if self.seen is not None:
            changes["seen"] = self.seen.at[rows, token].set(True)
        if self.logprobs is not None:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
            changes["logprobs"] = write(self.logprobs, jnp.where(self.done, 0, chosen))
        return self.replace(
            step=step, tokens=write(self.tokens, token), length=length, done=done, **changes
        )


def count_stats(stats: dict, rows: Bool[Array, " B"]) -> dict:
    """Statistics of one query per row, zero for rows that are done."""

    def keep(x):
        return jnp.where(rows.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0)

    return jax.tree.map(keep, stats)


def insert(carry: DecodeState, new: DecodeState, slots: Int[Array, " N"]) -> DecodeState:
    """`carry` with other rows in the places `slots`; rows without a place are dropped."""
    stats = jax.tree.map(lambda x, y: x.at[:, slots].set(y, mode="drop"), carry.stats, new.stats)
    rest = (x.replace(stats={}) for x in (carry, new))
    merged = jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), *rest)
    return merged.replace(stats=stats)


def blank(one: DecodeState, rows: int) -> DecodeState:
    """Rows that are done, of the same kind as those of `one`."""

    def empty(x):
        return jnp.zeros((rows, *x.shape[1:]), x.dtype)

    stats = jax.tree.map(lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype), one.stats)
    carry = jax.tree.map(empty, one.replace(stats={}))
    rolling = Rolling(carry.rolling.start + 1, carry.rolling.limit)
    return carry.replace(stats=stats, done=~carry.done, rolling=rolling)
