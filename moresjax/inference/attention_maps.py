"""The attention of single tokens of an answer on its images, head by head.

Axis legend: N images, L layers, H heads, Q queries, Y, X patches of an image.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.attention import AttentionMaps, image_grids
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.generation.lengths import bucket
from moresjax.inference.model import Model
from moresjax.sharding.mesh import use_mesh


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
    if not row.num_images:
        raise UserError("an attention map needs an image")
    if not len(chosen) or not all(0 <= place < len(tokens) for place in chosen):
        raise UserError(f"an answer of {len(tokens)} tokens has no tokens {[*chosen]}")
    model.service.check_answer(row, tokens)
    whole = row.append(tokens)
    batch = model.service.batch([whole], bucket(len(whole)), None if adapter is None else [adapter])
    queries = jnp.asarray([[len(row) - 1 + place for place in chosen]])
    graphdef, state = nnx.split(model.mllm)
    with use_mesh(model.mesh):
        maps = np.asarray(_maps(graphdef, state, batch, queries))
    visual = np.flatnonzero(whole.image >= 0) + model.mllm.tuning.num_virtual_tokens
    return image_grids(maps[:, 0][..., visual], row.num_images, model.config)


@functools.partial(jax.jit, static_argnums=0)
def _maps(
    graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, queries: Int[Array, "B Q"]
) -> Float[Array, "L B H Q S"]:
    probe = AttentionMaps(by_head=True)
    return nnx.merge(graphdef, state)(batch, probes=(probe,), queries=queries).stats[probe.name]
