"""Log-probabilities of the tokens of prompts themselves, with the most likely ones beside them.

Axis legend: B rows, S tokens, K listed tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.lengths import bucket, num_pieces, rounded_rows
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import use_mesh

MakeBatch = Callable[[Sequence[Row], int, Sequence[str | None] | None], Batch]


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """What a model makes of the tokens of one prompt.

    Attributes:
      logprobs: Natural log-probability of tokens 1 to S - 1 `[S - 1]`; the first has none.
      likely_ids: The most likely tokens after each token, the last included.
      likely_logprobs: Their log-probabilities.
    """

    logprobs: Float[np.ndarray, " _"]
    likely_ids: Int[np.ndarray, "S K"]
    likely_logprobs: Float[np.ndarray, "S K"]


def score_prompts(
    model: MLLM,
    make_batch: MakeBatch,
    rows: Sequence[Row],
    count: int,
    adapters: Sequence[str | None] | None = None,
    *,
    mesh: Mesh | None = None,
    config: EngineConfig = DEFAULT_ENGINE_CONFIG,
) -> list[PromptScores]:
    """Scores of the tokens of prompts, which are read as one batch.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> (scores,) = score_prompts(model.mllm, model.service.batch, [model.prompt("two ?")], 3)
    >>> scores.likely_ids.shape, bool((scores.logprobs < 0).all())
    ((3, 3), True)

    Args:
      model: The model.
      make_batch: Makes a batch of rows, a padded length and the names of the rows' adapters.
      rows: The prompts, unpadded.
      count: K.
      adapters: The adapter of every prompt; default: the base model.
      mesh: The devices that the parameters are on; None for a single device.
      config: Says how many bytes of logits are in memory at a time.
    """
    size = rounded_rows(len(rows), len(rows))
    padded = [*rows, *[rows[0]] * (size - len(rows))]
    names = None if adapters is None else [*adapters, *[adapters[0]] * (size - len(rows))]
    batch = make_batch(padded, bucket(max(map(len, rows))), names)
    graphdef, params = nnx.split(model)
    vocab = model.config.llm.vocab_size
    with use_mesh(mesh):
        found = _scores(graphdef, params, batch, min(count, vocab), config.logits_bytes)
    logprobs, ids, best = map(np.asarray, found)
    return [
        PromptScores(logprobs[n, : len(row) - 1], ids[n, : len(row)], best[n, : len(row)])
        for n, row in enumerate(rows)
    ]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _scores(
    graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, count: int, logits_bytes: int
) -> tuple[Float[Array, "B S"], Int[Array, "B S K"], Float[Array, "B S K"]]:
    """Log-probability of every next token, and the most likely ones."""
    model = nnx.merge(graphdef, params)
    tokens = jnp.asarray(batch.tokens)
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(batch, queries=columns).hidden
    targets = jnp.roll(tokens, -1, axis=1)
    rows, asked = tokens.shape
    pieces = num_pieces(rows, asked, 4 * model.config.llm.vocab_size, logits_bytes)
    size = -(-tokens.shape[1] // pieces)

    def in_pieces(x: Array) -> Array:
        pads = [(0, 0), (0, pieces * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pads)
        return jnp.moveaxis(x.reshape(len(tokens), pieces, size, *x.shape[2:]), 1, 0)

    def score(piece: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, targets = piece
        logits = model.llm.logits(hidden)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[..., 0] - total
        best, ids = jax.lax.top_k(logits, count)
        return chosen, ids, best - total[..., None]

    found = jax.lax.map(score, (in_pieces(hidden), in_pieces(targets)))

    def whole(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(len(tokens), -1, *x.shape[3:])[:, : tokens.shape[1]]

    chosen, ids, best = map(whole, found)
    return chosen, ids, best
