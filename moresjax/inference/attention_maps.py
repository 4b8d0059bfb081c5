"""The attention of single tokens of an answer: on its images head by head, share and LMAR.

Axis legend: N images, L layers, H heads, Q queries, G tokens of an answer, Y, X patches of an
image.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.attention import IMAGE, AttentionMaps, AttentionProbe, image_grids
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.generation.lengths import bucket
from moresjax.inference.model import Model
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.probes import Probe

BY_HEAD = (AttentionMaps(by_head=True),)
BY_TOKEN = (AttentionMaps(), AttentionProbe(by_query=True))


@dataclasses.dataclass(frozen=True)
class TokenAttention:
    """What each token of an answer looks at, averaged over heads.

    Attributes:
      share: The share of its attention on the images.
      lmar: Its attention per image token over that per token of question and answer; nan where it
        looks at no such token.
      grids: For every image its attention on the patches, as `AttentionMap.grids`; None where the
        visual tokens have no place on the image.
    """

    share: Float[np.ndarray, "G L"]
    lmar: Float[np.ndarray, "G L"]
    grids: Float[np.ndarray, "N L G Y X"] | None


def token_attention(
    model: Model, row: Row, tokens: Ids, *, first: int = 0, adapter: str | None = None
) -> TokenAttention:
    """Share, LMAR and maps of the tokens of a given answer, in one pass.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> row = model.prompt("how many ?", np.zeros((12, 12, 3), np.uint8))
    >>> token_attention(model, row, np.array([5, 6, 7])).share.shape
    (3, 2)

    Args:
      model: The model.
      row: The conversation up to the answer.
      tokens: The tokens of the answer.
      first: The number of the first token that is looked at; those before it were before.
      adapter: The name of the loaded adapter that answered; None for the base model.

    Raises:
      UserError: There is no image or no token, or the conversation is too long.
    """
    stats = _read(model, row, tokens, range(first, len(tokens)), adapter, BY_TOKEN)
    mass, score = (np.asarray(stats["attention"][name])[:, 0] for name in ("mass", "score"))
    image, text = np.moveaxis(score.mean(1)[..., :2], -1, 0)  # layers, tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        lmar = np.where(text > 0, image / text, np.nan)
    try:
        grids = _grids(model, row, np.asarray(stats["maps"])[:, 0])
    except UserError:
        grids = None
    return TokenAttention(mass.mean(1)[..., IMAGE].T, lmar.T, grids)


def answer_maps(
    model: Model,
    row: Row,
    tokens: Ids,
    *,
    places: Sequence[int] | None = None,
    adapter: str | None = None,
) -> Float[np.ndarray, "N L H Q _ _"]:
    """Where tokens of a given answer look on the images of its conversation.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> row = model.prompt("how many ?", np.zeros((12, 12, 3), np.uint8))
    >>> answer_maps(model, row, np.array([5, 6, 7]), places=[2]).shape
    (1, 2, 4, 1, 3, 3)

    The query of a token is the position whose logits gave it. One program serves all answers of
    about the same length.

    Args:
      model: The model.
      row: The conversation up to the answer.
      tokens: The tokens of the answer.
      places: Which of these tokens to look at; default: all.
      adapter: The name of the loaded adapter that answered; None for the base model.

    Returns:
      For every image the attention of each layer, head and token on its patches; nan where a patch
      has no token.

    Raises:
      UserError: There is no image or no token, a place is outside of the answer, the conversation
        is too long, or the connector's tokens have no place on the image.
    """
    chosen = range(len(tokens)) if places is None else places
    stats = _read(model, row, tokens, chosen, adapter, BY_HEAD)
    return _grids(model, row, np.asarray(stats["maps"])[:, 0])


def _grids(
    model: Model, row: Row, maps: Float[np.ndarray, "L *H Q S"]
) -> Float[np.ndarray, "N L *H Q _ _"]:
    """Attention on all keys as attention on the patches of the images."""
    visual = np.flatnonzero(row.image >= 0) + model.mllm.tuning.num_virtual_tokens
    return image_grids(maps[..., visual], row.num_images, model.config)


def _read(
    model: Model,
    row: Row,
    tokens: Ids,
    chosen: Sequence[int],
    adapter: str | None,
    probes: tuple[Probe, ...],
) -> dict[str, Any]:
    """What probes read at the queries that gave the chosen tokens of an answer."""
    if not row.num_images:
        raise UserError("attention on an image needs an image")
    if not len(chosen) or not all(0 <= place < len(tokens) for place in chosen):
        raise UserError(f"an answer of {len(tokens)} tokens has no tokens {[*chosen]}")
    model.service.check_answer(row, tokens)
    whole = row.append(tokens)
    # Of few lengths, so that few programs serve all answers; the last query stands for the rest.
    count = bucket(len(chosen), 8) if len(chosen) > 1 else 1
    queries = np.full((1, count), len(row) - 1 + chosen[-1])
    queries[0, : len(chosen)] = len(row) - 1 + np.asarray(chosen)
    names = [adapter] if model.mllm.tuning.held else None
    batch = model.service.batch([whole], bucket(len(whole)), names)
    graphdef, state = nnx.split(model.mllm)
    with use_mesh(model.mesh):
        stats = _stats(graphdef, probes, state, batch, jnp.asarray(queries))
    return jax.tree.map(lambda x: _first(x, count, len(chosen)), stats)


def _first(array: Array, count: int, kept: int) -> Array:
    """The first queries of statistics, whose last axis but one has the queries."""
    axis = array.ndim - 2
    assert array.shape[axis] == count
    return jax.lax.slice_in_dim(array, 0, kept, axis=axis)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stats(
    graphdef: nnx.GraphDef,
    probes: tuple[Probe, ...],
    state: nnx.State,
    batch: Batch,
    queries: Int[Array, "B Q"],
) -> dict[str, Any]:
    return nnx.merge(graphdef, state)(batch, probes=probes, queries=queries).stats
