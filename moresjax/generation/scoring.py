"""Log-likelihoods of given continuations; those of one prompt share its forward pass.

Axis legend: B rows, S tokens, Q scored tokens per row.

The continuations of a prompt stand behind it in one row, as branches of its layout: each sees the
prompt (and its images, which are encoded once) but none of the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.data.processor import Row
from moresjax.generation.engine import bucket
from moresjax.layout import Batch, Segment
from moresjax.models.mllm import MLLM
from moresjax.types import AnyArray, Ids


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
    trunk = len(prompt["tokens"])
    sizes = tuple(map(len, continuations))
    ids = [np.asarray(c, np.int32) for c in continuations]
    tail = np.concatenate([np.zeros(0, np.int32), *ids])
    branch = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
    start = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
    rank = np.arange(len(tail)) - start
    added = {
        "tokens": tail,
        "segment": np.full(len(tail), int(Segment.ANSWER)),
        "image": np.full(len(tail), -1),
        "position": prompt["position"][-1] + 1 + rank,
        "document": np.full(len(tail), prompt["document"][-1]),
        "branch": branch,
    }
    row = prompt | {
        name: np.concatenate([prompt[name], x]).astype(np.int32) for name, x in added.items()
    }
    # The first token of each is predicted by the prompt's last.
    queries = np.where(rank == 0, trunk - 1, trunk + np.arange(len(tail)) - 1)
    return Branches(row, queries.astype(np.int32), tail, sizes)


def score_rows(
    model: MLLM,
    make_batch: Callable[[Sequence[Row], int, Sequence[str | None] | None], Batch],
    pairs: Sequence[tuple[Row, Ids]],
    batch_size: int,
    adapters: Sequence[str | None] | None = None,
) -> list[Score]:
    """Scores of continuations; those of equal prompts to one adapter share a row.

    Args:
      model: what scores.
      make_batch: rows, padded to a length, with the names of their adapters.
      pairs: prompt row and token ids of the continuation.
      batch_size: rows per batch.
      adapters: for every pair the name of its adapter.
    """
    groups: dict[tuple, list[int]] = {}
    for number, (row, _) in enumerate(pairs):
        name = adapters[number] if adapters is not None else None
        key = row["tokens"].tobytes(), id(row.get("pixels")), name
        groups.setdefault(key, []).append(number)
    whole = [(g, branches(pairs[g[0]][0], [pairs[i][1] for i in g])) for g in groups.values()]
    whole.sort(key=lambda item: len(item[1].row["tokens"]))
    results: list[Score | None] = [None] * len(pairs)
    graphdef, state = nnx.split(model)
    for start in range(0, len(whole), batch_size):
        chosen = whole[start : start + batch_size]
        # Short batches are filled up, so that they do not compile anew.
        rows = chosen + chosen[:1] * (batch_size - len(chosen))
        filled = [b for _, b in rows]
        names = None if adapters is None else [adapters[numbers[0]] for numbers, _ in rows]
        size = bucket(max(len(b.queries) for b in filled), 8)

        def padded(x, size=size):
            return np.pad(x, (0, size - len(x)))

        length = bucket(max(len(b.row["tokens"]) for b in filled))
        batch = make_batch([b.row for b in filled], length, names)
        queries, targets = (
            np.stack([padded(getattr(b, name)) for b in filled]) for name in ("queries", "targets")
        )
        found = score_batch(graphdef, state, batch, queries, targets)
        for (numbers, b), logprobs, greedy in zip(chosen, *map(np.asarray, found), strict=False):
            ends = np.cumsum(b.sizes)
            for number, end, size in zip(numbers, ends, b.sizes, strict=True):
                own = slice(end - size, end)
                score = Score(float(logprobs[own].sum()), bool(greedy[own].all()), size)
                results[number] = score
    return results


@functools.partial(jax.jit, static_argnames="graphdef")
def score_batch(
    graphdef, state, batch: Batch, queries: Int[AnyArray, "B Q"], targets: Int[AnyArray, "B Q"]
) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
    """Log-probability of every target token, and whether it is the most likely one.

    Logits are computed for the queries only.
    """
    model = nnx.merge(graphdef, state)
    logits = model.llm.logits(model(batch, queries=queries).hidden)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)
    return chosen[..., 0], logits.argmax(-1) == targets
