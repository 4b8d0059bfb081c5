"""Which parts of a model and which tokens of a prompt an answer comes from.

Direct logit attribution writes the logit of a token as a sum: the residual stream is the sum of the
input embedding and of what every head, MLP and edit adds, and with the final norm's scale held at
the value that it has, norm and head are linear (Elhage et al. 2021). Effects through later layers
are not in it. Gradient attribution is the derivative of an answer's log-probability by the input
embeddings, times these (Simonyan et al. 2013; Shrikumar et al. 2016).

Axis legend: B rows, S tokens, L layers, N heads, H head size, D features, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.core.layout import Batch
from moresjax.core.types import AnyArray
from moresjax.models.block import Block
from moresjax.models.layers import Norm
from moresjax.models.mllm import MLLM
from moresjax.tuning.base import Params
from moresjax.tuning.hooks import AttachedWrite
from moresjax.tuning.probes import ProbeContext

EMBEDDED, HEADS = "llm.embed.out", "llm.block.o.in"
ATTENTION, MLP, OUT = "llm.block.attn.out", "llm.block.mlp.out", "llm.block.out"


@dataclasses.dataclass(frozen=True)
class ColumnProbe:
    """Keeps the activations of one token of every row at a site.

    Attributes:
      site: A site of an edit, or `llm.block.o.in`, where the outputs of a layer's heads stand.
      column: The token, virtual tokens counted.
    """

    site: str
    column: int

    @property
    def name(self) -> str:
        """The key of the activations in statistics."""
        return f"token {self.column} at {self.site}"

    def read(self, context: ProbeContext, h: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        """The activations in fp32."""
        return h[:, self.column].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LogitParts:
    """The summands of a logit, or of the difference of two.

    Attributes:
      embedding: Of the token's input embedding, with a learned position if there are some.
      heads: Of every attention head `[L, N]`.
      attention_rest: Of what else the attention branches add: their biases and edits `[L]`.
      mlps: Of the MLPs, with their edits `[L]`.
      edits: Of edits at the outputs of blocks, such as MoReS or a steering vector `[L]`.
      bias: Of the biases of final norm and head, and of edits between them.
      logit: What all of them add up to, as the model has it before a soft cap.
    """

    embedding: float
    heads: Float[np.ndarray, "L N"]
    attention_rest: Float[np.ndarray, " L"]
    mlps: Float[np.ndarray, " L"]
    edits: Float[np.ndarray, " L"]
    bias: float
    logit: float

    @property
    def attention(self) -> Float[np.ndarray, " L"]:
        """The summand of each layer's whole attention branch `[L]`."""
        return self.heads.sum(1) + self.attention_rest

    @property
    def total(self) -> float:
        """The sum of all summands."""
        layers = self.attention.sum() + self.mlps.sum() + self.edits.sum()
        return float(self.embedding + layers + self.bias)


def logit_parts(
    mllm: MLLM, batch: Batch, column: int, token: int, against: int | None = None
) -> LogitParts:
    """The summands of the logit of the token that follows a token of a row.

    Args:
      mllm: The model, without weight deltas (`tuning.merge.merged` folds them in).
      batch: A single row.
      column: The number of the token whose next one is meant.
      token: The id of the next token.
      against: The id of another one, whose logit is subtracted; None: none.
    """
    column += mllm.tuning.num_extra_tokens
    graphdef, state = nnx.split(mllm)
    ids = jnp.asarray([token, token if against is None else against])
    sign = jnp.asarray([1.0, 0.0 if against is None else -1.0])
    found = _logit_parts(graphdef, column, state, batch, ids, sign)
    fields: dict[str, Any] = {}
    for name, value in found.items():
        array = np.asarray(value, np.float64)
        fields[name] = array if array.ndim else float(array)
    return LogitParts(**fields)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logit_parts(
    graphdef: nnx.GraphDef,
    column: int,
    state: nnx.State,
    batch: Batch,
    ids: Int[Array, "2"],
    sign: Float[Array, "2"],
) -> dict[str, Array]:
    model = nnx.merge(graphdef, state)
    llm, config = model.llm, model.llm.config
    llm.restack()  # the weights of all layers in one array
    probes = {s: ColumnProbe(s, column) for s in (EMBEDDED, HEADS, ATTENTION, MLP, OUT)}
    stats = model(batch, probes=tuple(probes.values())).stats
    embedded = stats[probes[EMBEDDED].name][0, 0]
    heads, attention, mlps, outputs = (
        stats[probes[site].name][:, 0] for site in (HEADS, ATTENTION, MLP, OUT)
    )
    if llm.position is not None:
        place = batch.layout.position[0, column - model.tuning.num_extra_tokens]
        embedded = embedded + llm.position[...][place + config.position_offset]
    inputs = jnp.concatenate([embedded[None], outputs[:-1]])
    by_head = jax.vmap(functools.partial(_head_outputs, config.num_heads))(llm.blocks, heads)
    final = outputs[-1]

    head = llm.head.dense() if llm.head is not None else llm.embed.table[...].T
    direction = (head.astype(jnp.float32)[:, ids] * sign).sum(1)
    bias = llm.head.bias if llm.head is not None else llm.head_bias
    bias = 0.0 if bias is None else (bias[...][ids] * sign).sum()
    hidden = _hidden(model, batch, column, final)
    scale = _linear(llm.norm, final)

    def share(part: Float[Array, "*L D"]) -> Float[Array, "*L"]:
        return scale(part) @ direction

    logit = hidden @ direction + bias
    return {
        "embedding": share(embedded),
        "heads": share(by_head),
        "attention_rest": share(attention - by_head.sum(1)),
        "mlps": share(mlps),
        "edits": share(outputs - inputs - attention - mlps),
        "bias": logit - share(final),
        "logit": logit,
    }


def _hidden(
    model: MLLM, batch: Batch, column: int, final: Float[Array, " D"]
) -> Float[Array, " D"]:
    """What the head reads: the final norm's output after the edits there."""
    hooks = model.tuning.hooks(batch)
    shape = (1, batch.tokens.shape[1] + model.tuning.num_extra_tokens, len(final))
    whole = jnp.broadcast_to(model.llm.norm(final), shape)
    return hooks.edit("llm.norm.out", whole)[0, column].astype(jnp.float32)


def _linear(norm: Norm, x: Float[Array, " D"]) -> Callable[[Array], Array]:
    """A norm without its bias as a linear function, its divisor being that of `x`."""
    centred = x - x.mean() if norm.bias is not None else x
    divisor = jnp.sqrt(jnp.square(centred).mean() + norm.eps)
    scale = (norm.scale[...].astype(jnp.float32) + norm.offset) / divisor

    def apply(part: Float[Array, "*L D"]) -> Float[Array, "*L D"]:
        own = part - part.mean(-1, keepdims=True) if norm.bias is not None else part
        return own * scale

    return apply


def _head_outputs(heads: int, block: Block, outputs: Float[Array, " F"]) -> Array:
    """What each head adds to the residual stream `[N, D]`, from the heads' own outputs."""
    kernel = block.attn.o.dense().astype(jnp.float32)
    parts = jnp.einsum(
        "nh,nhd->nd", outputs.reshape(heads, -1), kernel.reshape(heads, -1, kernel.shape[-1])
    )
    if block.attn_post_norm is not None:
        bias = 0.0 if block.attn.o.bias is None else block.attn.o.bias[...]
        parts = _linear(block.attn_post_norm, parts.sum(0) + bias)(parts)
    if block.attn_scale is not None:
        parts = parts * block.attn_scale[...]
    return parts


def embedding_gradients(
    mllm: MLLM,
    batch: Batch,
    queries: Int[AnyArray, "B Q"],
    targets: Int[AnyArray, "B Q"],
    weights: Float[AnyArray, "B Q"],
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, "B S D"], Float[np.ndarray, "B S D"]]:
    """Log-probabilities of answers, and their derivatives by the input embeddings.

    Args:
      mllm: The model.
      batch: Prompts with answers.
      queries: The tokens before those of the answers.
      targets: The tokens of the answers.
      weights: 1 for a token of an answer, 0 for padding.

    Returns:
      The log-probability of each row's answer, the input embeddings (visual tokens have the
      connector's output) and the derivatives.
    """
    graphdef, state = nnx.split(mllm)
    found = _embedding_gradients(graphdef, state, batch, queries, targets, weights)
    value, embedded, gradient = (np.asarray(x) for x in found)
    return value, embedded, gradient


@functools.partial(jax.jit, static_argnums=0)
def _embedding_gradients(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: Batch,
    queries: Int[Array, "B Q"],
    targets: Int[Array, "B Q"],
    weights: Float[Array, "B Q"],
) -> tuple[Array, Array, Array]:
    model = nnx.merge(graphdef, state)
    extra, shape = (
        model.tuning.num_extra_tokens,
        (*batch.tokens.shape, model.config.llm.hidden_size),
    )
    seen: list[Array] = []

    def write(params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        seen.append(h[:, extra:].astype(jnp.float32))
        return h + jnp.pad(params["added"], ((0, 0), (extra, 0), (0, 0))).astype(h.dtype)

    def log_probabilities(added: Float[Array, "B S D"]) -> tuple[Array, tuple[Array, Array]]:
        writes = [(EMBEDDED, AttachedWrite(write, {"added": added}))]
        out = model(batch, queries=queries, writes=writes)
        logs = jax.nn.log_softmax(model.llm.logits(out.hidden))
        each = (jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0] * weights).sum(1)
        return each.sum(), (each, seen.pop())

    gradient, (each, embedded) = jax.grad(log_probabilities, has_aux=True)(
        jnp.zeros(shape, jnp.float32)
    )
    return each, embedded, gradient


def token_scores(
    embedded: Float[np.ndarray, "S D"], gradient: Float[np.ndarray, "S D"], method: str
) -> Float[np.ndarray, " S"]:
    """A score of every token from its embedding and the derivative by it.

    >>> token_scores(np.ones((1, 2)), np.asarray([[3.0, -4.0]]), "gradient_norm").tolist()
    [5.0]

    Args:
      embedded: The input embeddings.
      gradient: The derivative.
      method: `input_x_gradient`, to first order what the token's embedding adds to the value; or
        `gradient_norm`, how much the value can change.
    """
    if method == "gradient_norm":
        return np.linalg.norm(gradient, axis=-1)
    return (embedded * gradient).sum(-1)


METHODS: Sequence[str] = ("input_x_gradient", "gradient_norm")
