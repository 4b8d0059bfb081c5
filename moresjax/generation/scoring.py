"""Log-likelihoods of given continuations; those of one prompt share its forward pass.

Axis legend: B rows, S tokens, Q scored tokens per row.

The continuations of a prompt stand behind it in one row, as branches of its layout: each sees the
prompt (and its images, which are encoded once) but none of the others.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.generation.engine import bucket
from moresjax.generation.queue import PrefillScheduler


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
      logprob: natural log-probability of all of its tokens.
      greedy: whether greedy decoding would give these tokens.
      tokens: how many there are.
    """

    logprob: float
    greedy: bool
    tokens: int


@dataclasses.dataclass(frozen=True)
class Branches:
    """A prompt with continuations in one row.

    Attributes:
      row: the whole row.
      queries, targets: columns whose next token is scored, and that token `[Q]`.
      sizes: tokens of each continuation; they follow each other in `queries`.
    """

    row: Row
    queries: Int[np.ndarray, " Q"]
    targets: Int[np.ndarray, " Q"]
    sizes: tuple[int, ...]


def branches(prompt: Row, continuations: Sequence[Ids]) -> Branches:
    """Puts the continuations of a prompt behind it.

    Args:
      prompt: an unpadded row of at least one token.
      continuations: token ids of each.
    """
    trunk = len(prompt)
    sizes = tuple(map(len, continuations))
    ids = [np.asarray(c, np.int32) for c in continuations]
    # Nothing is asked after the last token of a continuation: it is not in the row.
    read = [len(c) - 1 for c in ids]
    start = np.cumsum([0, *read])[:-1]
    row, position = prompt, int(prompt.position[-1]) + 1
    for branch, continuation in enumerate(ids, 1):
        row = row.append(continuation[:-1], branch=branch, position=position)
    # The first token of each is predicted by the prompt's last.
    queries = [
        np.concatenate([[trunk - 1], trunk + first + np.arange(count)])
        for first, count in zip(start, read, strict=True)
    ]
    return Branches(row, np.concatenate(queries).astype(np.int32), np.concatenate(ids), sizes)


def by_prompt(
    pairs: Sequence[tuple[Row, Ids]], adapters: Sequence[str | None] | None = None
) -> list[list[int]]:
    """Numbers of the pairs (prompt row and token ids of a continuation) of each prompt to one
    adapter."""
    groups: dict[tuple, list[int]] = {}
    for number, (row, _) in enumerate(pairs):
        name = adapters[number] if adapters is not None else None
        key = row.tokens.tobytes(), id(row.pixels), name
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def score_rows(
    whole: Sequence[Branches], queue: PrefillScheduler, score: Callable
) -> list[list[Score]]:
    """Scores of the continuations in each row.

    Args:
      whole: the rows.
      queue: the same, in groups.
      score: gives log-probabilities and whether they are the largest, as `Engine.score`.
    """
    results: list[list[Score]] = [[] for _ in whole]
    while queue:
        group = queue.take()
        rows = [whole[i] for i in group.filled]
        size = bucket(max(len(b.queries) for b in rows), 8)
        # What is repeated at the end is not looked at.
        queries, targets = (
            np.stack([np.pad(x, (0, size - len(x)), mode="edge") for x in each])
            for each in ([b.queries for b in rows], [b.targets for b in rows])
        )
        found = score(group.batch, queries, targets, group.prefix, group.beginnings)
        for number, logprobs, greedy in zip(group.numbers, *map(np.asarray, found), strict=False):
            sizes = whole[number].sizes
            for end, length in zip(np.cumsum(sizes), sizes, strict=True):
                own = slice(end - length, end)
                total = float(logprobs[own].sum())
                results[number].append(Score(total, bool(greedy[own].all()), length))
    return results
