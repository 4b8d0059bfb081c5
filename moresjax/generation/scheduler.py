"""Many prompts through one batch of fixed size: rows that have ended make room for others.

A long answer therefore never holds a batch. Prompts are read in groups, whenever there are places
for one: decoding stops as soon as that many rows have ended.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from moresjax.core.types import AnyArray, Ids
from moresjax.generation.engine import Engine
from moresjax.generation.queue import PrefillScheduler
from moresjax.generation.sampling import GREEDY, Sampling

CHUNK = 16  # decode steps between two looks at which rows have said a stop string
GROUPS = 4  # in which a batch is filled
# New tokens of a row that the caches have room for at first; each time they are used up, for `MORE`
# times as many. Limits are high, answers short.
ROOM, MORE = 128, 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt was continued with; the fields are rows of those of `Generation`."""

    tokens: AnyArray
    logprobs: AnyArray | None
    stats: dict


def generate_many(
    engine: Engine,
    queue: PrefillScheduler,
    limits: Sequence[int],
    *,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    ended: Callable[[Ids], bool] | None = None,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, Completion]]:
    """Continues prompts; yields number and completion of each as soon as it has ended.

    Args:
      engine: what generates.
      queue: the prompts, in groups of at most `batch_size`.
      limits: at most this many new tokens of every prompt.
      batch_size: rows that are decoded at a time.
      sampling, logprobs: as in `Engine.generate`.
      seeds: of every prompt; default: `sampling.seed`.
      ended: whether new tokens contain a stop string; asked after every chunk, so up to `chunk`
        tokens may follow it.
      chunk: decode steps at a time.
    """
    seeds = [sampling.seed] * len(limits) if seeds is None else seeds
    new = max(limits, default=0)
    prompt, given = engine.num_virtual_tokens + queue.longest, min(new, ROOM)
    used = 1  # new tokens of the row that has most
    running: dict[int, int] = {}  # number of the prompt in each place that is taken
    carry = None
    while queue or running:
        free = [place for place in range(batch_size) if place not in running]
        while queue and len(free) >= queue.size:
            group = queue.take()
            places = dict(zip(free, group.numbers, strict=False))
            running |= places
            free = free[len(places) :]
            prompts = engine.prefill(
                group.batch,
                new,
                sampling=sampling,
                seeds=[seeds[i] for i in group.filled],
                logprobs=logprobs,
                limits=[limits[i] for i in group.filled],
                room=prompt + given,
                prefix=group.prefix,
                beginnings=group.beginnings,
            )
            # The places of the fillers do not exist.
            slots = [*places, *[batch_size] * (queue.size - len(places))]
            carry = engine.insert(carry, prompts, slots, batch_size)
        while given < min(new, used + chunk):
            given = min(new, MORE * given)
            carry = engine.grow(carry, prompt + given)
        carry = engine.advance(carry, chunk, queue.size if queue else batch_size)
        done, tokens, length = map(np.array, (carry.done, carry.tokens, carry.length))
        finished = {}
        for place in list(running):
            ids = tokens[place, : length[place]]
            if done[place] or (ended is not None and ended(ids)):
                done[place] = True
                finished[place] = running.pop(place), ids
        used = max((length[place] for place in running), default=1)
        carry = carry.replace(done=done)
        for place, (number, ids) in finished.items():
            chosen = None if carry.logprobs is None else carry.logprobs[place, : len(ids)]
            stats = jax.tree.map(lambda x, place=place: np.asarray(x[:, place]), carry.stats)
            yield number, Completion(ids, None if chosen is None else np.asarray(chosen), stats)
