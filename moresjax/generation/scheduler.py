"""Continuous batching: many prompts through one batch of fixed size.

A row that is done makes room for the next prompt, so a long answer never holds up a batch. The
`PrefillScheduler` decides which prompts are read together, and which prefixes before them;
`generate_continuously` reads such a `PrefillBatch` whenever there are free slots for it, and
decodes in between.

Prompts that are read together have about the same length and the same prefix. Their batches are
padded to a rounded size and a bucket length: few shapes, few compilations.
"""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.core.types import AnyArray, Ids
from moresjax.data.images import LazyPixels
from moresjax.generation.engine import Engine
from moresjax.generation.lengths import bucket, rounded, rounded_rows
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.shared_prefix import SharedPrefixes
from moresjax.generation.state import DecodeState, PrefixCache


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Prompts that are read together.

    Attributes:
      prompts: The numbers of the prompts.
      padded_with_fillers: The number of the prompt in each row of the batch: `prompts`, and after
        them fillers up to a rounded size.
      batch: The whole prompts, without images that belong to their prefixes.
      prefix: The prefixes, which are read already, or None.
      prefix_index: The row of `prefix` that each row begins with.
    """

    prompts: list[int]
    padded_with_fillers: list[int]
    batch: Batch
    prefix: PrefixCache | None
    prefix_index: list[int]


class _ReadPrefixes(NamedTuple):
    """Prefixes that are read: their numbers in the `SharedPrefixes`, and their cache."""

    numbers: list[int]
    cache: PrefixCache | None


_NOTHING = _ReadPrefixes([], None)


class PrefillScheduler:
    """Hands out prompts in batches, longest prefixes and longest prompts first.

    Args:
      rows: The prompts, unpadded.
      make_batch: Makes a batch of rows, a padded length and the names of the rows' adapters.
      size: The most rows of a batch; fewer prompts make smaller batches.
      adapters: The adapter of every prompt; default: the base model.
      shared: The prefixes that prompts have in common; default: none.
      read_prefixes: Reads the prefixes of some numbers, which are equally long.
      num_shards: The number of parts that rows are split into; smaller batches and the prefixes
        that are read at a time are multiples of it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        make_batch: Callable[[Sequence[Row], int, Sequence[str | None] | None], Batch],
        size: int,
        *,
        adapters: Sequence[str | None] | None = None,
        shared: SharedPrefixes | None = None,
        read_prefixes: Callable[[Sequence[int]], PrefixCache] | None = None,
        num_shards: int = 1,
    ) -> None:
        self._rows, self._make_batch, self._num_shards = rows, make_batch, num_shards
        self.size = size = rounded_rows(len(rows), size, num_shards)
        self._adapters, self._read_prefixes = adapters, read_prefixes
        self._shared = shared = shared or SharedPrefixes([-1] * len(rows))
        longest: dict[int, int] = {}
        for number, row in zip(shared.prefix_index, rows, strict=True):
            longest[number] = max(longest.get(number, 0), len(row))

        def order(prompt: int) -> tuple[int, ...]:
            number = shared.prefix_index[prompt]
            together = (-longest[number], number) if number >= 0 else ()
            return -shared.length(prompt), *together, -len(rows[prompt])

        self._waiting = deque(sorted(range(len(rows)), key=order))
        # Prefixes are read in equal numbers too: as many as a batch has on average. Those of the
        # last two times are held, because a batch may begin with some and end with others.
        having = max(sum(number >= 0 for number in shared.prefix_index), 1)
        self._at_once = -(-size * len(shared.rows) // having)
        self._at_once += -self._at_once % num_shards
        self._of_length = Counter(len(row) for row in shared.rows)
        self._last, self._held = _NOTHING, _NOTHING

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def longest(self) -> int:
        """The largest padded length of a prompt."""
        return max(map(self._padded, range(len(self._rows))), default=0)

    def _padded(self, prompt: int) -> int:
        prefix = self._shared.length(prompt)
        rest = len(self._rows[prompt]) - prefix
        # A prompt of which a token is left is that of another adapter; it costs a decode step.
        return (rest if rest == 1 and prefix else bucket(rest)) + rounded(prefix)

    def take(self) -> PrefillBatch:
        """The next prompts."""
        index, length = self._shared.prefix_index, self._shared.length
        first, prompts = self._waiting[0], []
        while self._waiting and len(prompts) < self.size:
            prompt = self._waiting[0]
            if length(prompt) != length(first):
                break
            if index[prompt] >= 0 and index[prompt] not in self._held.numbers:
                if any(index[i] not in self._last.numbers for i in prompts):
                    break
                self._read_next_prefixes()
            prompts.append(self._waiting.popleft())
        count = rounded_rows(len(prompts), self.size, self._num_shards)
        padded = prompts + prompts[:1] * (count - len(prompts))
        names = None if self._adapters is None else [self._adapters[i] for i in padded]
        rows = [self._rows[i] for i in padded]
        if index[first] >= 0 and self._shared.with_images:
            rows = [row.replace(pixels=None) for row in rows]
        batch = self._make_batch(rows, max(map(self._padded, prompts)), names)
        self._open_next_images()
        if index[first] < 0:
            return PrefillBatch(prompts, padded, batch, None, [0] * count)
        held = [self._held.numbers.index(index[i]) for i in padded]
        return PrefillBatch(prompts, padded, batch, self._held.cache, held)

    def _open_next_images(self) -> None:
        """Starts to open the images of the prompts that come next, while others are answered."""
        for prompt in itertools.islice(self._waiting, self.size):
            pixels, number = self._rows[prompt].pixels, self._shared.prefix_index[prompt]
            read = self._shared.with_images and number in self._held.numbers
            if isinstance(pixels, LazyPixels) and not read:
                pixels.fetch()

    def _read_next_prefixes(self) -> None:
        """Reads the prefixes that come next, and forgets those before the last ones."""
        assert self._read_prefixes is not None
        index, length = self._shared.prefix_index, self._shared.length
        size = length(self._waiting[0])
        near = itertools.takewhile(lambda prompt: length(prompt) == size, self._waiting)
        different = (number for number, _ in itertools.groupby(index[prompt] for prompt in near))
        at_once = rounded_rows(self._of_length[size], self._at_once, self._num_shards)
        numbers = list(itertools.islice(different, at_once))
        numbers += numbers[:1] * (at_once - len(numbers))
        cache = self._read_prefixes(numbers)
        (earlier, before), self._last = self._last, _ReadPrefixes(numbers, cache)
        if self._of_length[size] <= at_once:
            self._held = self._last
            return
        # The same number from the beginning on: one program.
        if before is None or before.length != size:
            earlier, before = numbers, cache
        self._held = _ReadPrefixes(earlier + numbers, before.concat(cache))


@dataclasses.dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt; the fields are rows of those of `Generation`.

    Attributes:
      tokens: The new token ids, the end token included `[G]`.
      logprobs: Their natural log-probabilities `[G]`; None when not asked for.
      stats: For each probe its statistics, summed over the queries or as it folds them; leaves have
        a leading axis L.
    """

    tokens: Int[AnyArray, " G"]
    logprobs: Float[AnyArray, " G"] | None
    stats: dict


def generate_continuously(
    engine: Engine,
    scheduler: PrefillScheduler,
    limits: Sequence[int],
    *,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    ended: Callable[[Ids], bool] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Continues prompts; yields number and completion of each as soon as it has ended.

    Args:
      engine: The engine, whose `config` sets how often rows are looked at.
      scheduler: The prompts, in batches of at most `batch_size`.
      limits: The most new tokens of every prompt.
      batch_size: The number of slots, which are rows that are decoded together.
      sampling: How tokens are chosen.
      seeds: The seed of every prompt's draws; default: `sampling.seed`.
      logprobs: Whether to return log-probabilities.
      ended: Whether new tokens contain a stop string; asked every `decode_chunk` steps, so up to
        that many tokens may follow it.
    """
    config, chunk = engine.config, engine.config.decode_chunk
    seeds = [sampling.seed] * len(limits) if seeds is None else seeds
    most = max(limits, default=0)
    prompt_length = engine.num_virtual_tokens + scheduler.longest
    room = min(most, config.initial_new_tokens)  # new tokens that the caches have room for
    used = 1  # new tokens of the row that has most
    running: dict[int, int] = {}  # the number of the prompt in each slot that is taken
    state: DecodeState | None = None
    while scheduler or running:
        free = [slot for slot in range(batch_size) if slot not in running]
        while scheduler and len(free) >= scheduler.size:
            prefill = scheduler.take()
            taken = dict(zip(free, prefill.prompts, strict=False))
            running |= taken
            free = free[len(taken) :]
            new = engine.prefill(
                prefill.batch,
                most,
                sampling=sampling,
                seeds=[seeds[i] for i in prefill.padded_with_fillers],
                logprobs=logprobs,
                limits=[limits[i] for i in prefill.padded_with_fillers],
                cache_length=prompt_length + room,
                prefix=prefill.prefix,
                prefix_index=prefill.prefix_index,
            )
            # Fillers get a slot that does not exist.
            slots = [*taken, *[batch_size] * (len(prefill.padded_with_fillers) - len(taken))]
            state = engine.insert(state, new, slots, batch_size)
        assert state is not None  # every batch fits into empty slots
        while room < min(most, used + chunk):
            room = min(most, config.cache_growth * room)
            state = engine.grow(state, prompt_length + room)
        state = engine.advance(state, chunk, scheduler.size if scheduler else batch_size)
        done, tokens, length = map(np.array, (state.done, state.tokens, state.length))
        finished = {}
        for slot in list(running):
            ids = tokens[slot, : length[slot]]
            if done[slot] or (ended is not None and ended(ids)):
                done[slot] = True
                finished[slot] = running.pop(slot), ids
        used = max((length[slot] for slot in running), default=1)
        state = state.replace(done=done)
        for slot, (number, ids) in finished.items():
            chosen = None if state.logprobs is None else state.logprobs[slot, : len(ids)]
            stats = jax.device_get(_of_row(state.stats, slot)) if state.stats else {}
            yield number, Completion(ids, None if chosen is None else np.asarray(chosen), stats)


@jax.jit
def _of_row(stats: dict, row: int | Int[AnyArray, ""]) -> dict:
    """The statistics of one row: one program for all rows, and one copy to the host."""
    return jax.tree.map(lambda x: x[:, row], stats)
