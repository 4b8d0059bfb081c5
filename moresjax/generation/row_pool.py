"""Rows that are answered together while others come and go: continuous batching step by step.

`RowPool` is what a server decodes with: prompts are admitted into free rows between two steps,
rows leave when they have ended or nobody wants their answers any more, and the others go on. What
a row is given does not depend on its company.

Axis legend: B rows, S prompt tokens, G new tokens, W kept steps, K listed tokens, T cache length.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.core.types import AnyArray
from moresjax.generation.engine import Engine
from moresjax.generation.lengths import bucket, rounded_rows
from moresjax.generation.sampling import GREEDY, RowChoice, Sampling
from moresjax.generation.state import DecodeState

SMALLEST_CACHE = 256  # tokens; caches are powers of two, for few compilations


@dataclasses.dataclass(frozen=True, eq=False)
class PoolRequest:
    """A prompt to continue.

    Attributes:
      row: The prompt, unpadded.
      max_new_tokens: The most new tokens.
      adapter: The name of the adapter that answers; None for the base model.
      sampling: How tokens are chosen, with the seed; the repetition penalty is the pool's.
      listed: Whether to list the most likely tokens at every new one.
    """

    row: Row
    max_new_tokens: int
    adapter: str | None = None
    sampling: Sampling = GREEDY
    listed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The padded length and the number of images; equal ones are read together."""
        return bucket(len(self.row)), self.row.num_images


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What a row was given in one step.

    Attributes:
      slot: The row.
      ids: Its new token ids.
      logprobs: Their natural log-probabilities under the model.
      likely_ids: For each of them the most likely tokens; None where they are not listed.
      likely_logprobs: Their log-probabilities.
      done: Whether these are its last; its place is free then.
    """

    slot: int
    ids: Int[np.ndarray, " N"]
    logprobs: Float[np.ndarray, " N"]
    likely_ids: Int[np.ndarray, "N K"] | None
    likely_logprobs: Float[np.ndarray, "N K"] | None
    done: bool


class RowPool:
    """A batch of rows that prompts enter and leave one by one.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> pool = RowPool(model.service.engine(), model.service.batch, rows=2, most=8)
    >>> slots = pool.admit([PoolRequest(model.prompt("how many ?"), max_new_tokens=3)])
    >>> [len(new.ids) for new in pool.step()], pool.num_free
    ([3], 2)

    Args:
      engine: The engine, without probes.
      make_batch: Makes a batch of rows, a padded length and the names of the rows' adapters.
      rows: B.
      most: G, the most new tokens that a row may ask for.
      chunk: The most new tokens of a row in one step.
      listed: K.
      penalty: The repetition penalty of all rows; None for none.
      adapters: Whether requests choose adapters.
    """

    def __init__(
        self,
        engine: Engine,
        make_batch: Callable[[Sequence[Row], int, Sequence[str | None] | None], Batch],
        *,
        rows: int,
        most: int,
        chunk: int = 8,
        listed: int = 20,
        penalty: float | None = None,
        adapters: bool = False,
    ) -> None:
        self._engine, self._make_batch, self._adapters = engine, make_batch, adapters
        self.rows, self.most, self.chunk = rows, most, chunk
        self._listed = listed, chunk + 1
        self._sampling = Sampling(repetition_penalty=penalty)
        self._state: DecodeState | None = None
        self._running: dict[int, PoolRequest] = {}
        self._told = np.zeros(rows, int)  # how many tokens of each row `step` has returned

    @property
    def num_free(self) -> int:
        """How many rows are free."""
        return self.rows - len(self._running)

    @property
    def most_at_once(self) -> int:
        """The most prompts that are read together."""
        most = max(self.rows // self._engine.config.prefills_per_batch, 1)
        return most + -most % self._engine.num_shards

    def admit(self, requests: Sequence[PoolRequest]) -> list[int]:
        """Reads prompts of one shape into free rows and chooses the first new token of each.

        Args:
          requests: At most `num_free` and at most `most_at_once` prompts.

        Returns:
          The row of each.
        """
        length, _ = requests[0].shape
        # One row or as many as there may be: two programs for a length.
        count = rounded_rows(1, self.most_at_once, self._engine.num_shards)
        count = self.most_at_once if len(requests) > count else count
        padded = [*requests, *[requests[0]] * (count - len(requests))]
        names = [one.adapter for one in padded] if self._adapters else None
        batch = self._make_batch([one.row for one in padded], length, names)
        new = self._engine.prefill(
            batch,
            self.most,
            sampling=self._sampling,
            seeds=[one.sampling.seed for one in padded],
            logprobs=True,
            limits=[one.max_new_tokens for one in padded],
            cache_length=self._engine.num_virtual_tokens + length + 1,
            choice=_choice(padded),
            listed=self._listed,
        )
        free = [slot for slot in range(self.rows) if slot not in self._running]
        slots = free[: len(requests)]
        self._running |= dict(zip(slots, requests, strict=True))
        self._told[slots] = 0
        if len(self._running) == len(requests):
            self._state = None  # nobody needs a cache as long as the last ones had
        size = self._cache_length()
        if self._state is not None:
            size = max(size, self._state.cache_layout.shape[1])
            self._state = self._grown(self._state, size)
        # Fillers get a row that does not exist.
        places = [*slots, *[self.rows] * (count - len(requests))]
        self._state = self._engine.insert(self._state, self._grown(new, size), places, self.rows)
        return slots

    def step(self, stop_after_done: int | None = None) -> list[NewTokens]:
        """At most `chunk` more tokens of every row, and what has come of it.

        Args:
          stop_after_done: Stops as soon as this many more rows have ended; default: all.
        """
        if self._state is None or not self._running:
            return []
        enough = self.rows
        if stop_after_done is not None:
            enough = min(self.num_free + stop_after_done, self.rows)
        size = max(self._cache_length(), self._state.cache_layout.shape[1])
        state = self._grown(self._state, size)
        self._state = state = self._engine.advance(state, self.chunk, enough)
        done, length, tokens = map(np.asarray, (state.done, state.length, state.tokens))
        logprobs = np.asarray(state.logprobs)
        likely = None
        if state.likely is not None and any(one.listed for one in self._running.values()):
            likely = np.asarray(state.likely.ids), np.asarray(state.likely.logprobs)
        found = []
        for slot, request in list(self._running.items()):
            places = np.arange(self._told[slot], length[slot])
            ids, best = None, None
            if likely is not None and request.listed:
                ids, best = (x[slot, places % self._listed[1]] for x in likely)
            one = tokens[slot, places], logprobs[slot, places], ids, best, bool(done[slot])
            found.append(NewTokens(slot, *one))
            self._told[slot] = length[slot]
            if done[slot]:
                del self._running[slot]
        return found

    def release(self, slots: Sequence[int]) -> None:
        """Ends rows whose answers nobody wants any more; their places are free at once."""
        if self._state is None or not slots:
            return
        done = np.array(self._state.done)
        done[list(slots)] = True
        self._state = self._state.replace(done=done)
        for slot in slots:
            self._running.pop(slot, None)

    def _cache_length(self) -> int:
        """T that the rows need for the tokens of the next step: a power of two."""
        ahead = self._engine.num_virtual_tokens
        needed = [
            ahead + max(len(one.row) + int(self._told[slot]) + self.chunk + 2, one.shape[0] + 1)
            for slot, one in self._running.items()
        ]
        return 1 << (max(*needed, SMALLEST_CACHE, 2) - 1).bit_length()

    def _grown(self, state: DecodeState, size: int) -> DecodeState:
        """The state with caches of this length."""
        return state if state.cache_layout.shape[1] == size else self._engine.grow(state, size)


def _choice(requests: Sequence[PoolRequest]) -> RowChoice:
    """The requests' own settings."""

    def values(name: str, kind: type) -> AnyArray:
        return jnp.asarray([getattr(one.sampling, name) for one in requests], kind)

    return RowChoice(
        values("temperature", jnp.float32),
        values("top_k", jnp.int32),
        values("top_p", jnp.float32),
        jnp.asarray([one.listed for one in requests], bool),
    )
