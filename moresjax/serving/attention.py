"""Where the tokens of an answer look on its images, read in one pass over prompt and answer.

Axis legend: N images, L layers, H heads, G answer tokens, S tokens, T keys, V visual tokens,
Y, X patches of an image.
"""

import base64
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.attention import TEXT_VARIANTS, image_grids
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.generation.lengths import bucket
from moresjax.inference.model import Model
from moresjax.models.attention import attention_probabilities
from moresjax.tuning.base import Probe, ProbeContext


@dataclasses.dataclass(frozen=True)
class _Maps:
    """Attention of the chosen queries on all keys: of every head, or their mean.

    Attributes:
      by_head: Whether heads stay apart.
    """

    by_head: bool = False
    name: str = "maps"
    site: str = "attn"

    def read(
        self, context: ProbeContext, q: Float[Array, "B H S D"], k: Float[Array, "B K T D"]
    ) -> Float[Array, "B M G T"]:
        """The maps of one layer; M is the number of heads, or 1."""
        if context.queries is not None:
            q = jnp.take_along_axis(q, context.queries[:, None, :, None], axis=2)
        maps = attention_probabilities(q, k, context.mask, context.softcap)
        return maps if self.by_head else maps.mean(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _read(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    queries: Int[Array, "1 G"],
    probe: Probe,
) -> Float[Array, "L 1 M G T"]:
    model = nnx.merge(graphdef, params)
    return model(batch, probes=(probe,), queries=queries).stats[probe.name]


def _maps(
    model: Model, row: Row, ids: list[int], adapter: str | None, tokens: range, *, by_head: bool
) -> Float[np.ndarray, "L M G T"]:
    """Attention of some of the tokens that follow a prompt."""
    whole = row.append(ids)
    names = [adapter] if model.mllm.tuning.held else None
    batch = model.service.batch([whole], bucket(len(whole)), names)
    columns = np.arange(tokens.start, tokens.stop) + len(row) - 1
    padded = np.pad(columns, (0, bucket(len(columns), 8) - len(columns)), mode="edge")
    graphdef, params = nnx.split(model.mllm)
    found = _read(graphdef, params, batch, jnp.asarray(padded)[None], _Maps(by_head))
    return np.asarray(found)[:, 0, :, : len(columns)]


def answer_attention(
    model: Model, row: Row, ids: list[int], adapter: str | None
) -> dict[str, Any] | None:
    """Share, LMAR and maps of every token of an answer; None without images or tokens.

    Runs on the scheduler's thread.

    Args:
      model: The model.
      row: The prompt.
      ids: The answer's tokens, without the one that ends it.
      adapter: The adapter that answered.
    """
    if not ids or not row.num_images:
        return None
    maps = _maps(model, row, ids, adapter, range(len(ids)), by_head=False)[:, 0]
    whole, ahead = row.append(ids), model.mllm.tuning.num_virtual_tokens
    own = maps[:, :, ahead : ahead + len(whole)]
    columns = np.arange(len(ids)) + len(row) - 1
    seen = np.arange(len(whole)) <= columns[:, None]
    image = seen & (whole.image >= 0)
    text = seen & np.isin(whole.kind, [int(kind) for kind in TEXT_VARIANTS["text"]])
    share = (own * image).sum(-1)
    per_image_token = share / np.maximum(image.sum(-1), 1)
    per_text_token = (own * text).sum(-1) / np.maximum(text.sum(-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lmar = per_image_token / per_text_token
    lmar = [[x if np.isfinite(x) else None for x in layer] for layer in lmar.T.tolist()]
    tokens = [model.prompts.tokenizer.decode([token]) for token in ids]
    found = {"tokens": tokens, "ids": ids, "share": share.T.tolist(), "lmar": lmar}
    return found | {"maps": _array(_grids(model, row, own))}


def head_maps(
    model: Model, row: Row, ids: list[int], adapter: str | None, token: int
) -> dict[str, Any] | None:
    """The maps of every head for one token of an answer `[N, L, H, Y, X]`.

    None where tokens have no place. The arguments are those of `answer_attention`, and the token's
    number.
    """
    maps = _maps(model, row, ids, adapter, range(token, token + 1), by_head=True)[:, :, 0]
    ahead = model.mllm.tuning.num_virtual_tokens
    return _array(_grids(model, row, maps[:, :, ahead : ahead + len(row)]))


def _grids(
    model: Model, row: Row, maps: Float[np.ndarray, "L M T"]
) -> Float[np.ndarray, "N L M Y X"] | None:
    """Maps on the patches of the images; None for a connector whose tokens have no place."""
    values = maps[:, :, np.flatnonzero(row.image >= 0)]
    try:
        return image_grids(values, row.num_images, model.config)
    except UserError:
        return None


def _array(values: Float[np.ndarray, "..."] | None) -> dict[str, Any] | None:
    """An array as JSON takes it: shape, type, and its bytes in base64."""
    if values is None:
        return None
    data = np.ascontiguousarray(values, "<f4").tobytes()
    encoded = base64.b64encode(data).decode()
    return {"shape": list(values.shape), "dtype": "<f4", "data": encoded}
