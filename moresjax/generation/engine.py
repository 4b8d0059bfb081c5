"""Generation: a jitted prefill and one jitted while-loop of decode steps.

Axis legend: B rows, S prompt tokens, G new tokens, T = P + S + G cache length (P attached slots),
L layers.

Prefill runs the whole model; decoding runs the bare LLM on unstacked layers, so that each layer's
cache is a buffer of its own that XLA updates in place. Methods that cannot act on a generated token
are dropped from the decode model: with MoReS attached, the decode program is that of the base LLM.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from moresjax.layout import Batch, Segment, TokenLayout, valid_mask
from moresjax.models.block import LayerCache
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import extend_layout
from moresjax.tuning.base import Probe
from moresjax.types import AnyArray, pytree_dataclass


@pytree_dataclass
class Generation:
    """What was generated.

    Attributes:
      tokens: new token ids `[B, G]`, the pad id after the end.
      length: number of new tokens per row, the end token included `[B]`.
      stats: per probe, its statistics summed over the queries that gave the new tokens; leaves have
        leading axes `[L, B]`.
    """

    tokens: Int[AnyArray, "B G"]
    length: Int[AnyArray, " B"]
    stats: dict


@pytree_dataclass
class Progress:
    """State of the decode loop."""

    step: Int[AnyArray, ""]  # new tokens so far
    tokens: Int[AnyArray, "B G"]
    done: Bool[AnyArray, " B"]
    length: Int[AnyArray, " B"]
    position: Int[AnyArray, " B"]  # of the last token
    document: Int[AnyArray, " B"]
    adapter: Int[AnyArray, " B"] | None
    keys: TokenLayout  # of the cache [B, T]
    caches: list[LayerCache]
    stats: dict


class Engine:
    """Generates with a model; greedy.

    Args:
      model: the model; it is not changed.
      eos_ids: tokens that end a row.
      pad_id: what fills a row after its end.
      probes: statistics to accumulate.
    """

    def __init__(
        self,
        model: MLLM,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        probes: Sequence[Probe] = (),
    ):
        self._prefill = nnx.split(_unstacked(model))
        self._decode = nnx.split(_decode_model(model))
        self._ends = tuple(eos_ids), pad_id
        self._probes = tuple(probes)

    def generate(self, batch: Batch, max_new_tokens: int) -> Generation:
        """Continues every row by at most `max_new_tokens` tokens.

        Rows may be padded on either side; a row's continuation does not depend on the others.
        Compiles once per batch shape and `max_new_tokens`.
        """
        return self.decode(self.prefill(batch, max_new_tokens))

    def prefill(self, batch: Batch, max_new_tokens: int) -> Progress:
        """The first half of `generate`: reads the prompts and chooses the first new tokens."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        options = {"probes": self._probes, "ends": self._ends}
        return _prefill(*self._prefill, batch, new=max_new_tokens, **options)

    def decode(self, progress: Progress) -> Generation:
        """The second half: the other new tokens. The caches are consumed."""
        done = _decode(*self._decode, progress, probes=self._probes, ends=self._ends)
        return Generation(done.tokens, done.length, done.stats)

    def lower_decode(self, batch: Batch, max_new_tokens: int):
        """The lowered decode program for a batch of this shape, for inspection."""
        options = {"probes": self._probes, "ends": self._ends}
        carry = _prefill.eval_shape(*self._prefill, batch, new=max_new_tokens, **options)
        return _decode.lower(*self._decode, carry, **options)


def _unstacked(model: MLLM) -> MLLM:
    model = nnx.clone(model)
    model.llm.unstack()
    return model


def _decode_model(model: MLLM) -> MLLM:
    """The LLM with the methods that act while decoding, and nothing of the vision side."""
    model = _unstacked(model)
    model.tuning = model.tuning.for_decoding()
    model.config = dataclasses.replace(model.config, vision=None, connector="identity")
    model.tuning.config = model.config
    del model.vision, model.connector
    return model


@functools.partial(jax.jit, static_argnames=("graphdef", "new", "probes", "ends"))
def _prefill(graphdef, state, batch: Batch, *, new: int, probes, ends) -> Progress:
    model = nnx.merge(graphdef, state)
    ahead = model.tuning.num_ahead
    rows, length = batch.layout.shape
    last = length - 1 - jnp.argmax(valid_mask(batch.layout)[:, ::-1], axis=1)
    out = model(batch, probes=probes, queries=last[:, None], keep_cache=True)

    def at_last(x):
        return jnp.take_along_axis(jnp.asarray(x), last[:, None], axis=1)[:, 0]

    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    total = ahead + length + new

    def room(x, axis, fill=0):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, total - x.shape[axis])
        return jnp.pad(x, pads, constant_values=fill)

    full = extend_layout(batch.layout, ahead)
    keys = jax.tree.map(lambda x: room(jnp.asarray(x), 1), full)
    alive = jnp.ones(rows, bool)
    carry = Progress(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((rows, new), ends[1], jnp.int32),
        done=~alive,
        length=jnp.zeros(rows, jnp.int32),
        position=at_last(batch.layout.position) + ahead,
        document=at_last(batch.layout.document),
        adapter=batch.adapter,
        keys=keys.replace(image=room(jnp.asarray(full.image), 1, -1)),
        caches=[jax.tree.map(lambda x: room(x, 2), cache) for cache in out.cache],
        stats=_count(out.stats, alive),
    )
    return _append(carry, model.llm.logits(hidden), ends)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "probes", "ends"), donate_argnames=("carry",)
)
def _decode(graphdef, state, carry: Progress, *, probes, ends) -> Progress:
    # The whole carry is returned, so that the donated caches are the buffers that are written.
    model = nnx.merge(graphdef, state)
    new = carry.tokens.shape[1]
    first = carry.keys.shape[1] - new

    def goes_on(carry):
        return (carry.step < new) & ~carry.done.all()

    def one_step(carry):
        index = first + carry.step - 1
        tokens = jax.lax.dynamic_slice_in_dim(carry.tokens, carry.step - 1, 1, axis=1)
        segment = jnp.where(carry.done, int(Segment.PAD), int(Segment.ANSWER))
        position = carry.position + 1
        zeros = jnp.zeros_like(position)
        fields = {
            "segment": segment,
            "image": zeros - 1,
            "position": position,
            "document": carry.document,
            "branch": zeros,
        }
        step = TokenLayout(
            **{name: x[:, None].astype(jnp.int32) for name, x in fields.items()},
            visual_tokens=carry.keys.visual_tokens,
        )
        keys = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), index, 1),
            carry.keys,
            step,
        )
        out = model.decode_step(tokens, step, carry.caches, keys, index, probes, carry.adapter)
        stats = jax.tree.map(jnp.add, carry.stats, _count(out.stats, ~carry.done))
        carry = dataclasses.replace(
            carry, position=position, keys=keys, caches=out.cache, stats=stats
        )
        return _append(carry, model.llm.logits(out.hidden[:, 0]), ends)

    return jax.lax.while_loop(goes_on, one_step, carry)


def _append(carry: Progress, logits, ends) -> Progress:
    """Chooses each row's next token and writes it down."""
    eos, pad = ends
    token = jnp.where(carry.done, pad, logits.argmax(-1)).astype(jnp.int32)
    tokens = jax.lax.dynamic_update_slice_in_dim(carry.tokens, token[:, None], carry.step, axis=1)
    return dataclasses.replace(
        carry,
        step=carry.step + 1,
        tokens=tokens,
        length=carry.length + ~carry.done,
        done=carry.done | jnp.isin(token, jnp.asarray(eos)),
    )


def _count(stats, rows: Bool[Array, " B"]):
    """Statistics of one query per row, zero for rows that are done."""

    def keep(x):
        return jnp.where(rows.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0)

    return jax.tree.map(keep, stats)


def bucket(length: int, smallest: int = 32) -> int:
    """The padded length for a prompt: powers of two and the midpoints between them."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if np.log2(size) % 1 == 0 else size * 4 // 3
    return size
