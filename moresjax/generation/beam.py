"""Beam search: the continuations of highest total log-probability, several at a time.

Axis legend: B rows, K beams per row, C candidates per row, G new tokens, V vocabulary.

A hypothesis that has ended is worth its log-probability divided by its length to the power of
`length_penalty` (Wu et al. 2016 without their constant, as in `transformers`). Every row searches
by itself: what it finds does not depend on the other rows of the batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.generation.sampling import Sampling, penalized
from moresjax.generation.state import DecodeState

STOPPING = (False, True, "never")
_NEVER = -1e9  # the score of what must not be chosen


@dataclasses.dataclass(frozen=True)
class Beams:
    """Settings of the search, with the meaning they have in `transformers`.

    Attributes:
      num_beams: K, hypotheses that are followed at a time; 1: no search.
      length_penalty: above 0 longer hypotheses are preferred, below 0 shorter ones.
      early_stopping: when a row with K ended hypotheses ends. True: at once. False: when its best
        open one is worth less than all of them at its present length. "never": when it would be
        worth less at any length.

    Raises:
      UserError: for a value out of range.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self):
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.early_stopping not in STOPPING:
            raise choice_error("early_stopping", self.early_stopping, STOPPING)

    def check(self, sampling: Sampling, **others: object) -> None:
        """Raises a `UserError` when other options cannot go together with the search.

        Args:
          sampling: how tokens would be chosen.
          others: by name, options that must be empty.
        """
        named = {"temperature": sampling.temperature} | others
        wrong = next((name for name, value in named.items() if value), None)
        if self.num_beams > 1 and wrong is not None:
            raise UserError(f"num_beams={self.num_beams} cannot be used together with {wrong}")


@pytree_dataclass
class _Search:
    """State of the search; hypotheses that have ended stand in descending order of their worth."""

    carry: DecodeState  # the open hypotheses, B * K rows
    scores: Float[AnyArray, "B K"]  # their log-probabilities
    found: Int[AnyArray, "B K G"]  # tokens of those that have ended
    worth: Float[AnyArray, "B K"]
    length: Int[AnyArray, "B K"]
    ended: Bool[AnyArray, "B K"]  # whether there is one in this place
    improves: Bool[AnyArray, " B"]  # whether an open one may still be worth more
    goes_on: Bool[AnyArray, ""]


def beam_search(
    carry: DecodeState,
    logits: Float[Array, "B V"],
    beams: Beams,
    step: Callable[[DecodeState], tuple[DecodeState, Float[Array, "R V"]]],
) -> tuple[Int[Array, "B G"], Int[Array, " B"]]:
    """Tokens and length of each row's best continuation, the end token included.

    Args:
      carry: the rows after their prompts.
      logits: of the first new token.
      beams: settings.
      step: reads the tokens chosen last; gives the logits of the next ones.
    """
    rows, new = carry.tokens.shape
    count = beams.num_beams
    spread = lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x  # noqa: E731
    carry, logits = jax.tree.map(spread, (carry, logits))
    first = jnp.where(jnp.arange(count) == 0, 0.0, _NEVER)  # the others are the same so far
    state = _Search(
        carry=carry,
        scores=jnp.broadcast_to(first, (rows, count)),
        found=carry.tokens.reshape(rows, count, new),
        worth=jnp.full((rows, count), _NEVER),
        length=jnp.zeros((rows, count), jnp.int32),
        ended=jnp.zeros((rows, count), bool),
        improves=jnp.ones(rows, bool),
        goes_on=jnp.asarray(True),
    )

    def body(state):
        carry, logits = step(state.carry)
        return _advance(dataclasses.replace(state, carry=carry), logits, beams)

    state = jax.lax.while_loop(lambda s: s.goes_on, body, _advance(state, logits, beams))
    return state.found[:, 0], state.length[:, 0]


def _advance(state: _Search, logits: Float[Array, "R V"], beams: Beams) -> _Search:
    """One more token for all open hypotheses."""
    carry, rules, count = state.carry, state.carry.rules, beams.num_beams
    rows, _, new = state.found.shape
    size = carry.step + 1  # tokens of the candidates
    logprobs = jax.nn.log_softmax(logits)
    if carry.seen is not None:
        logprobs = penalized(logprobs, carry.seen, rules.sampling.repetition_penalty)
    totals = state.scores[:, :, None] + logprobs.reshape(rows, count, -1)
    # So many that K of them go on even when the best ones end.
    kept = min(max(2, 1 + len(rules.eos)) * count, totals[0].size)
    scores, flat = jax.lax.top_k(totals.reshape(rows, -1), kept)
    parent, token = flat // logits.shape[-1], flat % logits.shape[-1]
    tokens = _of_row(carry.tokens.reshape(rows, count, new), parent)
    tokens = tokens.at[:, :, carry.step].set(token)
    ends = jnp.isin(token, jnp.asarray(rules.eos)) | (size == new)

    # What has ended, if it is among the K best and the row still counts it.
    counted = state.improves[:, None]
    if beams.early_stopping is True:
        counted &= ~state.ended.all(axis=1, keepdims=True)
    counted &= ends & (jnp.arange(kept) < count)
    value = jnp.where(counted, scores / size.astype(jnp.float32) ** beams.length_penalty, _NEVER)
    worth, best = jax.lax.top_k(jnp.concatenate([state.worth, value], axis=1), count)

    def merged(old, fresh):
        return _of_row(jnp.concatenate([old, fresh], axis=1), best)

    ended = merged(state.ended, counted)

    # What goes on.
    scores, open_ = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), count)
    parent, token = _of_row(parent, open_), _of_row(token, open_)
    at = (jnp.arange(rows)[:, None] * count + parent).reshape(-1)
    seen = carry.seen
    if seen is not None:
        seen = seen[at].at[jnp.arange(len(at)), token.reshape(-1)].set(True)
    carry = carry.replace(
        step=size,
        tokens=_of_row(tokens, open_).reshape(-1, new),
        caches=jax.tree.map(lambda x: x[at], carry.caches),
        seen=seen,
    )
    reach = new if beams.early_stopping == "never" and beams.length_penalty > 0 else size
    hope = scores[:, :1] / jnp.asarray(reach, jnp.float32) ** beams.length_penalty
    least = jnp.where(ended, worth.min(axis=1, keepdims=True), _NEVER)
    improves = state.improves & (hope > least).any(axis=1)
    goes_on = improves.any() & ~ends.all()
    if beams.early_stopping is True:
        goes_on &= ~ended.all()
    return _Search(
        carry=carry,
        scores=scores,
        found=merged(state.found, tokens),
        worth=worth,
        length=merged(state.length, jnp.full((rows, kept), size)),
        ended=ended,
        improves=improves,
        goes_on=goes_on,
    )


def _of_row(x: Array, chosen: Int[Array, "B C"]) -> Array:
    """`x[row, chosen[row]]`."""
    return jax.vmap(lambda x, chosen: x[chosen])(x, chosen)
