"""Beam search: the continuations of highest total log-probability, several at a time.

Axis legend: B rows, K beams per row, C candidates per row, G new tokens, V vocabulary.

A hypothesis that has ended is worth its log-probability divided by its length to the power of
`length_penalty` (Wu et al. 2016 without their constant, which is what `transformers` computes).
Every row searches by itself: what it finds does not depend on the other rows of the batch.
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
    """The settings of a beam search, with the meaning they have in `transformers`.

    >>> Beams(num_beams=4, length_penalty=2.0)
    Beams(num_beams=4, length_penalty=2.0, early_stopping=False)
    >>> Beams(0)
    Traceback (most recent call last):
    moresjax.core.errors.UserError: num_beams must be at least 1, got 0

    Attributes:
      num_beams: K, the hypotheses that are followed at a time; 1 stands for no search.
      length_penalty: Longer hypotheses are preferred above 0, shorter ones below 0.
      early_stopping: When a row with K ended hypotheses ends. True: at once. False: when its best
        open one is worth less than all of them at its present length. "never": when it would be
        worth less at any length.

    Raises:
      UserError: A value is out of range.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.early_stopping not in STOPPING:
            raise choice_error("early_stopping", self.early_stopping, STOPPING)

    def check(self, sampling: Sampling, **others: object) -> None:
        """Refuses options that do not go together with the search.

        Args:
          sampling: How tokens would be chosen.
          others: Options by name, which must be empty.

        Raises:
          UserError: An option is used together with a search.
        """
        named = {"temperature": sampling.temperature} | others
        wrong = next((name for name, value in named.items() if value), None)
        if self.num_beams > 1 and wrong is not None:
            raise UserError(f"num_beams={self.num_beams} cannot be used together with {wrong}")


@pytree_dataclass
class _BeamState:
    """The state of the search; ended hypotheses stand in descending order of their worth."""

    state: DecodeState  # the open hypotheses, B * K rows
    scores: Float[AnyArray, "B K"]  # their log-probabilities
    found: Int[AnyArray, "B K G"]  # tokens of those that have ended
    worth: Float[AnyArray, "B K"]
    length: Int[AnyArray, "B K"]
    ended: Bool[AnyArray, "B K"]  # whether there is one in this place
    improves: Bool[AnyArray, " B"]  # whether an open one may still be worth more
    unfinished: Bool[AnyArray, ""]


def beam_search(
    state: DecodeState,
    logits: Float[Array, "B V"],
    beams: Beams,
    step: Callable[[DecodeState], tuple[DecodeState, Float[Array, "R V"]]],
) -> tuple[Int[AnyArray, "B G"], Int[AnyArray, " B"]]:
    """Tokens and length of each row's best continuation, the end token included.

    Args:
      state: The rows after their prompts.
      logits: The logits of the first new token.
      beams: The settings.
      step: Reads the tokens chosen last, R = B * K rows; returns the state and the logits of the
        next ones.
    """
    rows, new = state.tokens.shape
    count = beams.num_beams

    def spread(x: Array) -> Array:
        return jnp.repeat(x, count, axis=0) if x.ndim else x

    state, logits = jax.tree.map(spread, (state, logits))
    first = jnp.where(jnp.arange(count) == 0, 0.0, _NEVER)  # the others are the same so far
    search = _BeamState(
        state=state,
        scores=jnp.broadcast_to(first, (rows, count)),
        found=state.tokens.reshape(rows, count, new),
        worth=jnp.full((rows, count), _NEVER),
        length=jnp.zeros((rows, count), jnp.int32),
        ended=jnp.zeros((rows, count), bool),
        improves=jnp.ones(rows, bool),
        unfinished=jnp.asarray(True),
    )

    def body(search: _BeamState) -> _BeamState:
        state, logits = step(search.state)
        return _advance(dataclasses.replace(search, state=state), logits, beams)

    search = _advance(search, logits, beams)
    search = jax.lax.while_loop(lambda search: search.unfinished, body, search)
    return search.found[:, 0], search.length[:, 0]


def _advance(search: _BeamState, logits: Float[Array, "R V"], beams: Beams) -> _BeamState:
    """One more token for all open hypotheses."""
    state, config, count = search.state, search.state.config, beams.num_beams
    rows, _, new = search.found.shape
    size = state.step + 1  # tokens of the candidates
    logprobs = jax.nn.log_softmax(logits)
    if state.seen is not None:
        logprobs = penalized(logprobs, state.seen, config.sampling.repetition_penalty or 1.0)
    totals = search.scores[:, :, None] + logprobs.reshape(rows, count, -1)
    # So many that K of them go on even when the best ones end.
    kept = min(max(2, 1 + len(config.eos_ids)) * count, totals[0].size)
    scores, flat = jax.lax.top_k(totals.reshape(rows, -1), kept)
    parent, token = flat // logits.shape[-1], flat % logits.shape[-1]
    tokens = _of_row(state.tokens.reshape(rows, count, new), parent)
    tokens = tokens.at[:, :, state.step].set(token)
    ends = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32)) | (size == new)

    # What has ended, if it is among the K best and the row still counts it.
    counted = search.improves[:, None]
    if beams.early_stopping is True:
        counted &= ~search.ended.all(axis=1, keepdims=True)
    counted &= ends & (jnp.arange(kept) < count)
    value = jnp.where(counted, scores / size.astype(jnp.float32) ** beams.length_penalty, _NEVER)
    worth, best = jax.lax.top_k(jnp.concatenate([search.worth, value], axis=1), count)

    def merged(old: AnyArray, fresh: AnyArray) -> Array:
        return _of_row(jnp.concatenate([old, fresh], axis=1), best)

    ended = merged(search.ended, counted)

    # What goes on.
    scores, open_ = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), count)
    parent, token = _of_row(parent, open_), _of_row(token, open_)
    at = (jnp.arange(rows)[:, None] * count + parent).reshape(-1)
    seen = state.seen
    if seen is not None:
        seen = seen[at].at[jnp.arange(len(at)), token.reshape(-1)].set(True)
    state = state.replace(
        step=size,
        tokens=_of_row(tokens, open_).reshape(-1, new),
        caches=jax.tree.map(lambda x: x[at], state.caches),
        seen=seen,
    )
    reach = new if beams.early_stopping == "never" and beams.length_penalty > 0 else size
    hope = scores[:, :1] / jnp.asarray(reach, jnp.float32) ** beams.length_penalty
    least = jnp.where(ended, worth.min(axis=1, keepdims=True), _NEVER)
    improves = search.improves & (hope > least).any(axis=1)
    unfinished = improves.any() & ~ends.all()
    if beams.early_stopping is True:
        unfinished &= ~ended.all()
    return _BeamState(
        state=state,
        scores=scores,
        found=merged(search.found, tokens),
        worth=worth,
        length=merged(search.length, jnp.full((rows, kept), size)),
        ended=ended,
        improves=improves,
        unfinished=unfinished,
    )


def _of_row(x: AnyArray, chosen: Int[Array, "B C"]) -> Array:
    """`x[row, chosen[row]]`."""
    return jax.vmap(lambda x, chosen: x[chosen])(x, chosen)
