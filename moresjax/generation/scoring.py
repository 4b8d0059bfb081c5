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
from moresjax.generation.lengths import bucket
from moresjax.generation.scheduler import PrefillScheduler


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """How likely a continuation is.

    >>> score = ContinuationScore(logprob=-1.5, is_greedy=True, num_tokens=3)
    >>> score.logprob / score.num_tokens
    -0.5

    Attributes:
      logprob: The natural log-probability of all of its tokens.
      is_greedy: Whether greedy decoding would give these tokens.
      num_tokens: The number of its tokens.
    """

    logprob: float
    is_greedy: bool
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class BranchedRow:
    """A prompt with its continuations in one row.

    Attributes:
      row: The whole row.
      queries: Columns whose next token is scored `[Q]`.
      targets: That next token `[Q]`.
      sizes: The number of tokens of each continuation; they follow each other in `queries`.
    """

    row: Row
    queries: Int[np.ndarray, " Q"]
    targets: Int[np.ndarray, " Q"]
    sizes: tuple[int, ...]


def with_branches(prompt: Row, continuations: Sequence[Ids]) -> BranchedRow:
    """Puts the continuations of a prompt behind it.

    Args:
      prompt: An unpadded row of at least one token.
      continuations: The token ids of each.
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
    return BranchedRow(row, np.concatenate(queries).astype(np.int32), np.concatenate(ids), sizes)


def group_by_prompt(
    pairs: Sequence[tuple[Row, Ids]], adapters: Sequence[str | None] | None = None
) -> list[list[int]]:
    """The numbers of the pairs that share a prompt and an adapter, for each such prompt.

    Args:
      pairs: A prompt row and the token ids of a continuation each.
      adapters: The adapter of every pair; default: the base model.
    """
    groups: dict[tuple, list[int]] = {}
    for number, (row, _) in enumerate(pairs):
        name = adapters[number] if adapters is not None else None
        marks = b"" if row.marks is None else row.marks.tobytes()
        key = row.tokens.tobytes(), id(row.pixels), row.region_key, marks, name
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def score_continuations(
    branched: Sequence[BranchedRow], scheduler: PrefillScheduler, score: Callable
) -> list[list[ContinuationScore]]:
    """Scores of the continuations in each row.

    Args:
      branched: The rows.
      scheduler: The same rows, in batches.
      score: `Engine.score`, or a function like it.
    """
    results: list[list[ContinuationScore]] = [[] for _ in branched]
    while scheduler:
        prefill = scheduler.take()
        rows = [branched[i] for i in prefill.padded_with_fillers]
        size = bucket(max(len(b.queries) for b in rows), 8)
        # What is repeated at the end is not looked at.
        queries, targets = (
            np.stack([np.pad(x, (0, size - len(x)), mode="edge") for x in each])
            for each in ([b.queries for b in rows], [b.targets for b in rows])
        )
        found = score(prefill.batch, queries, targets, prefill.prefix, prefill.prefix_index)
        for number, logprobs, greedy in zip(prefill.prompts, *map(np.asarray, found), strict=False):
            sizes = branched[number].sizes
            for end, length in zip(np.cumsum(sizes), sizes, strict=True):
                own = slice(end - length, end)
                total, alike = float(logprobs[own].sum()), bool(greedy[own].all())
                results[number].append(ContinuationScore(total, alike, length))
    return results
