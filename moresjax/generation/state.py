"""What generation holds: the state of the decode loop, prefix caches and the finished tokens.

Axis legend: B rows, N rows or prefixes that are read together, G new tokens, P virtual tokens
before a row, T cache length, L layers, K key/value heads, H head size, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from moresjax.core.layout import TokenLayout
from moresjax.core.ops import write_at
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.generation.sampling import (
    GREEDY,
    RowChoice,
    Sampling,
    choose_by_row,
    choose_token,
)
from moresjax.models.block import LayerCache
from moresjax.tuning.probes import ChosenToken, Probe


@pytree_dataclass
class Generation:
    """The new tokens of a batch.

    >>> import numpy as np
    >>> generation = Generation(np.array([[7, 8, 0], [7, 5, 6]]), np.array([2, 3]), stats={})
    >>> [row[:n].tolist() for row, n in zip(generation.tokens, generation.length)]
    [[7, 8], [7, 5, 6]]

    Attributes:
      tokens: The new token ids `[B, G]`, the pad id after the end of a row.
      length: The number of new tokens per row, the end token included `[B]`.
      stats: For each probe its statistics of the queries that gave the new tokens, summed or as it
        folds them; leaves have leading axes `[L, B]`.
      logprobs: Natural log-probabilities of the new tokens under the model, before any sampling
        setting `[B, G]`, 0 after the end of a row; None when not asked for.
    """

    tokens: Int[AnyArray, "B G"]
    length: Int[AnyArray, " B"]
    stats: dict
    logprobs: Float[AnyArray, "B G"] | None = None


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keys and values of N different prefixes of one length, which prompts begin with.

    Attributes:
      caches: One per layer, `[N, K, T, H]` with `P + length <= T`.
      length: The number of tokens of each prefix.
    """

    caches: list[LayerCache]
    length: int

    def concat(self, other: "PrefixCache") -> "PrefixCache":
        """The prefixes of both, which are equally long; those of `other` come last."""
        return PrefixCache(_concat(self.caches, other.caches), self.length)


@jax.jit
def _concat(*caches: list[LayerCache]) -> list[LayerCache]:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *caches)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The static part of a `DecodeState`: how rows end and how their tokens are chosen.

    Attributes:
      eos_ids: Tokens that end a row.
      pad_id: The token that fills a row after its end.
      sampling: How tokens are chosen; its seed is not used.
      logprobs: Whether the log-probabilities of the chosen tokens are kept.
      listed: How many of the most likely tokens are listed for the rows that ask for it; 0: none.
      listed_steps: For how many of a row's last tokens they are held.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling = GREEDY
    logprobs: bool = False
    listed: int = 0
    listed_steps: int = 1

    def no_likely(self, rows: int) -> "LikelyTokens | None":
        """Room for the most likely tokens of so many rows, where they are listed."""
        shape = rows, self.listed_steps, self.listed
        return LikelyTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape)) if self.listed else None


@pytree_dataclass
class RowBudgets:
    """Where each row of a continuously batched state begins, and how far it may go.

    Attributes:
      start: The cache index of a row's first new token `[B]`.
      limit: The most new tokens of a row `[B]`.
    """

    start: Int[AnyArray, " B"]
    limit: Int[AnyArray, " B"]


@pytree_dataclass
class LikelyTokens:
    """The K most likely tokens at a row's last W new tokens: those of token g are in place g mod W.

    Attributes:
      ids: Token ids, the most likely one first.
      logprobs: Their log-probabilities.
    """

    ids: Int[AnyArray, "B W K"]
    logprobs: Float[AnyArray, "B W K"]

    def add(self, logprobs: Float[Array, "B V"], number: Int[AnyArray, " B"]) -> "LikelyTokens":
        """With the most likely tokens at the token of this number of every row."""
        rows, place = jnp.arange(len(self.ids)), number % self.ids.shape[1]
        best, ids = jax.lax.top_k(logprobs, self.ids.shape[2])
        return LikelyTokens(
            jnp.asarray(self.ids).at[rows, place].set(ids.astype(jnp.int32)),
            jnp.asarray(self.logprobs).at[rows, place].set(best),
        )


@pytree_dataclass
class DecodeState:
    """The state of the decode loop.

    All rows of a plain batch have equally many new tokens and share the next cache index. With
    `budgets` every row has its own, so that a row which is done can make room for another prompt
    (continuous batching).

    Attributes:
      step: The number of new tokens: one number, or `[B]` with `budgets`.
      tokens: The new tokens.
      done: Whether a row has ended.
      length: The number of new tokens per row, the end token included.
      position: The position of each row's last token.
      document: The document of each row's last token.
      adapter: The adapter of each row, or None for the base model.
      cache_layout: The layout of all tokens in the caches `[B, T]`.
      caches: Keys and values of every layer.
      stats: Statistics of the probes so far.
      config: How rows end and how tokens are chosen (static).
      seeds: The seed of each row; None for greedy choice.
      seen: Tokens that a row holds, for the repetition penalty; None without one.
      logprobs: Log-probabilities of the new tokens; None when not asked for.
      budgets: The budgets of continuously batched rows; None for a plain batch.
      steps_left: The steps that continuously batched rows still make before the loop stops.
      stop_after_done: The loop stops earlier as soon as this many of them are done.
      choice: The settings that rows have of their own; None where those of `config` hold for all.
      likely: The most likely tokens of the rows that ask for them; None without any.
    """

    step: Int[AnyArray, "..."]
    tokens: Int[AnyArray, "B G"]
    done: Bool[AnyArray, " B"]
    length: Int[AnyArray, " B"]
    position: Int[AnyArray, " B"]
    document: Int[AnyArray, " B"]
    adapter: Int[AnyArray, " B"] | None
    cache_layout: TokenLayout
    caches: list[LayerCache]
    stats: dict
    config: DecodeConfig = dataclasses.field(metadata={"static": True})
    seeds: UInt[AnyArray, " B"] | None = None
    seen: Bool[AnyArray, "B V"] | None = None
    logprobs: Float[AnyArray, "B G"] | None = None
    budgets: RowBudgets | None = None
    steps_left: Int[AnyArray, ""] | None = None
    stop_after_done: Int[AnyArray, ""] | None = None
    choice: RowChoice | None = None
    likely: LikelyTokens | None = None

    @property
    def cache_index(self) -> Int[AnyArray, "..."]:
        """Where the last new token stands in the cache: one index, or `[B]` with `budgets`."""
        if self.budgets is None:
            return self.cache_layout.shape[1] - self.tokens.shape[1] + self.step - 1
        return self.budgets.start + self.step - 1

    @property
    def last_token(self) -> Int[Array, "B 1"]:
        """The tokens chosen last."""
        if self.budgets is None:
            return jax.lax.dynamic_slice_in_dim(self.tokens, self.step - 1, 1, axis=1)
        return jnp.take_along_axis(self.tokens, self.step[:, None] - 1, axis=1)

    @property
    def unfinished(self) -> Bool[AnyArray, ""]:
        """Whether the decode loop makes another step."""
        if self.steps_left is None or self.stop_after_done is None:
            return (self.step < self.tokens.shape[1]) & ~self.done.all()
        return (self.steps_left > 0) & (self.done.sum() < self.stop_after_done)

    def replace(self, **changes: object) -> "DecodeState":
        """The state with other values in some fields."""
        return dataclasses.replace(self, **changes)

    def append(self, logits: Float[Array, "B V"]) -> "DecodeState":
        """The state after each row's next token has been chosen from its logits."""
        config, rows = self.config, jnp.arange(len(self.done))
        if self.choice is None:
            token = choose_token(logits, config.sampling, self.seen, self.seeds, self.length)
        else:
            assert self.seeds is not None  # rows of their own settings may draw
            penalty = config.sampling.repetition_penalty or 1.0
            known = (self.choice, self.seen, penalty, self.seeds, self.length)
            token = choose_by_row(logits, *known)
        token = jnp.where(self.done, config.pad_id, token).astype(jnp.int32)
        length = self.length + ~self.done
        done = self.done | jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32))
        step = self.step + 1

        def write(buffer: AnyArray, column: Array) -> Array:
            if self.budgets is None:
                return write_at(buffer, column[:, None], self.step, 1)
            return jnp.asarray(buffer).at[rows, self.step].set(column, mode="drop")

        changes = {}
        if self.budgets is not None:
            step, done = length, done | (length >= self.budgets.limit)
        if self.steps_left is not None:
            changes["steps_left"] = self.steps_left - 1
        if self.seen is not None:
            changes["seen"] = jnp.asarray(self.seen).at[rows, token].set(True)
        if self.likely is not None and self.choice is not None:
            asked = (jnp.asarray(self.choice.listed) & ~self.done).any()
            changes["likely"] = jax.lax.cond(
                asked,
                lambda held: held.add(jax.nn.log_softmax(logits), self.length),
                lambda held: held,
                self.likely,
            )
        if self.logprobs is not None:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
            changes["logprobs"] = write(self.logprobs, jnp.where(self.done, 0, chosen))
        return self.replace(
            step=step, tokens=write(self.tokens, token), length=length, done=done, **changes
        )


def fold_stats(
    probes: Sequence[Probe], stats: dict, before: DecodeState, after: DecodeState
) -> DecodeState:
    """The state after a token with what the probes make of its query.

    Args:
      probes: The probes.
      stats: What they read at the query that the token was chosen at.
      before: The state before the token, whose statistics are empty at the first.
      after: The state after it.
    """
    if not probes:
        return after
    ids = after.last_token[:, 0]
    ends = jnp.isin(ids, jnp.asarray(after.config.eos_ids, jnp.int32))
    most = after.tokens.shape[1]
    alive = ~jnp.asarray(before.done)
    token = ChosenToken(ids, jnp.asarray(before.length), alive, ends, most)
    totals = dict(before.stats)
    for probe in probes:
        if probe.name in stats:  # decoding reads no images
            fold = getattr(probe, "fold", add_stats)
            totals[probe.name] = fold(totals.get(probe.name), stats[probe.name], token)
    return after.replace(stats=totals)


def add_stats(total: Any, new: Any, token: ChosenToken) -> Any:
    """The sum of statistics over the queries of each row; rows that have ended add nothing."""

    def keep(x: Array) -> Array:
        return jnp.where(token.alive.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0)

    new = jax.tree.map(keep, new)
    return new if total is None else jax.tree.map(jnp.add, total, new)
