"""What happens to an answer when keys and values of a prompt are taken away.

Axis legend: I interventions, B of them at a time, L layers, S tokens, T tokens with virtual ones,
Q tokens before those of the answer, K key heads, H head size.

A prompt with its answer is read once, and keys and values of all layers are kept. An intervention
changes those of some tokens in some layers, for all that is read behind a column `first`: what
stands before stays as the untouched pass had it. The rest (the question and the answer, or the
answer alone) is then read on the changed keys and values. So an effect is what the later tokens
got from these tokens at these layers, directly: what other tokens before `first` had taken over
from them stays.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moresjax.core.layout import Batch, TokenLayout
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.models.block import LayerCache
from moresjax.models.decoder import DecoderConfig
from moresjax.models.layers import Rope, apply_rope, rope_table
from moresjax.models.mllm import MLLM, PrefillChunk
from moresjax.tuning.attach import adapter_numbers
from moresjax.tuning.base import Params
from moresjax.tuning.hooks import AttachedWrite
from moresjax.tuning.masks import extend_layout

MASK = "llm.block.attn.mask"
# What may stand in the place of keys and values; `hide` leaves them out of the softmax.
REMOVALS = ("mean", "zero", "noise", "swap", "hide")


class Structure:
    """What is compiled in of a model.

    Finding the hash of a model's graph takes longer than a small program; here it is known.
    """

    def __init__(self, graphdef: nnx.GraphDef) -> None:
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.graphdef == other.graphdef)


# Equal graphs share one structure, so that programs find it without comparing them again.
_structure = functools.lru_cache(maxsize=8)(Structure)


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model as programs take it.

    Attributes:
      structure: What is compiled in.
      state: Its parameters.
    """

    structure: Structure
    state: nnx.State

    @classmethod
    def of(cls, mllm: MLLM) -> "SplitModel":
        """A model with its blocks in a list (`Decoder.unstack`)."""
        graphdef, state = nnx.split(mllm)
        return cls(_structure(graphdef), state)


@pytree_dataclass
class Reading:
    """A prompt with its answer, as it was read once.

    Attributes:
      batch: The single row, without its images.
      caches: Keys and values of all of its tokens, layer by layer.
      first: The column from which interventions read again.
      queries: The columns before those of the answer's tokens; the last one fills up.
      targets: The tokens of the answer.
      weights: 1 for a token of the answer, 0 for what fills up.
    """

    batch: Batch
    caches: list[LayerCache]
    first: Int[AnyArray, ""]
    queries: Int[AnyArray, " Q"]
    targets: Int[AnyArray, " Q"]
    weights: Float[AnyArray, " Q"]


@pytree_dataclass
class Interventions:
    """What is taken away from whom.

    Attributes:
      layers: The layers that each intervention acts in `[I, L]`.
      keys: The tokens whose keys and values it takes away `[I, S]`.
      readers: The tokens that it takes them from `[I, S]`; None: all that are read again. Only
        hiding can tell readers apart.
    """

    layers: Bool[AnyArray, "I L"]
    keys: Bool[AnyArray, "I S"]
    readers: Bool[AnyArray, "I S"] | None = None

    def behind_nothing(self) -> "Interventions":
        """The same behind a first one that takes nothing away."""
        return jax.tree.map(lambda x: np.pad(x, ((1, 0), (0, 0))), self)


def read_once(
    model: SplitModel,
    batch: Batch,
    first: int,
    queries: Int[np.ndarray, " Q"],
    targets: Int[np.ndarray, " Q"],
    weights: Float[np.ndarray, " Q"],
) -> Reading:
    """Reads a prompt with its answer and keeps all keys and values.

    Args:
      model: The model.
      batch: The single row, padded on the right.
      first: The column from which interventions read again; no image stands behind it.
      queries: The columns before those of the answer's tokens.
      targets: The tokens of the answer.
      weights: 1 for a token of the answer, 0 for what fills up.
    """
    caches = _caches(model.structure, model.state, batch)
    text = Batch(
        batch.tokens, batch.layout, None, batch.roi, batch.adapter, marks=batch.marks
    )  # images have been read
    return Reading(text, caches, jnp.int32(first), queries, targets, weights)


@functools.partial(jax.jit, static_argnums=0)
def _caches(structure: Structure, state: nnx.State, batch: Batch) -> list[LayerCache]:
    model = nnx.merge(structure.graphdef, state)
    one = jnp.zeros((1, 1), jnp.int32)  # of the last layer, keys and values are all that is needed
    caches = model(batch, queries=one, keep_cache=True).cache
    assert caches is not None  # because they are to be kept
    return caches


def replacements(
    model: SplitModel,
    reading: Reading,
    removal: str,
    visual: Bool[np.ndarray, " S"],
    *,
    other: Reading | None = None,
    seed: int = 0,
) -> list[LayerCache] | None:
    """The keys and values that stand in the place of those taken away; None where they are hidden.

    Args:
      model: The model.
      reading: The prompt.
      removal: `zero`; `mean`, the mean over the prompt's visual tokens, of keys before rotation;
        `noise`, normal draws with their mean and standard deviation, feature by feature; `swap`,
        those of another prompt at the same columns; or `hide`.
      visual: The prompt's visual tokens.
      other: The other prompt, of the same layout.
      seed: Seeds the noise.
    """
    if removal == "hide":
        return None
    if removal == "swap":
        assert other is not None
        return other.caches
    if removal == "zero":
        return _zeros(reading.caches)
    key = jax.random.key(seed) if removal == "noise" else None
    return _moments(model.structure, model.state, reading, jnp.asarray(visual), key)


@jax.jit
def _zeros(caches: list[LayerCache]) -> list[LayerCache]:
    return jax.tree.map(jnp.zeros_like, caches)


@functools.partial(jax.jit, static_argnums=0)
def _moments(
    structure: Structure,
    state: nnx.State,
    reading: Reading,
    visual: Bool[Array, " S"],
    key: PRNGKeyArray | None,
) -> list[LayerCache]:
    """The mean of the visual tokens' keys and values at every place, or draws around it."""
    model: MLLM = nnx.merge(structure.graphdef, state)
    layout = _whole_layout(model, reading.batch)
    chosen = jnp.pad(visual, (model.tuning.num_virtual_tokens, 0))[:, None]
    count = jnp.maximum(chosen.sum(), 1)

    def drawn(x: Float[Array, "1 K T H"], number: int) -> Float[Array, "1 K T H"]:
        wide = x.astype(jnp.float32)
        mean = jnp.where(chosen, wide, 0).sum(2, keepdims=True) / count
        if key is None:
            return jnp.broadcast_to(mean, x.shape).astype(x.dtype)
        spread = jnp.where(chosen, wide - mean, 0)
        scale = jnp.sqrt((spread * spread).sum(2, keepdims=True) / count)
        noise = jax.random.normal(jax.random.fold_in(key, number), x.shape)
        return (mean + scale * noise).astype(x.dtype)

    found = []
    for layer, cache in enumerate(reading.caches):
        rope = _rope(model.llm.config, layout, layer)
        keys, own = jnp.asarray(cache.k), jnp.asarray(cache.v)
        keys = keys if rope is None else apply_rope(keys, (rope[0], -rope[1]))
        keys = drawn(keys, 2 * layer)
        keys = keys if rope is None else apply_rope(keys, rope)
        found.append(LayerCache(keys, drawn(own, 2 * layer + 1)))
    return found


def _whole_layout(model: MLLM, batch: Batch) -> TokenLayout:
    """The layout of a row with its virtual tokens."""
    table = model.tuning.virtual_table()
    present = None if table is None else table[adapter_numbers(batch)]
    return extend_layout(batch.layout, model.tuning.num_virtual_tokens, present)


def _rope(config: DecoderConfig, layout: TokenLayout, layer: int) -> Rope | None:
    """The rotation of a layer's keys."""
    if config.positions == "learned":
        return None
    frequencies = config.rope_frequencies(config.local_layers[layer])
    return rope_table(jnp.asarray(layout.position), frequencies, layout.shape[1])


def answer_scores(
    model: SplitModel,
    reading: Reading,
    interventions: Interventions,
    values: Sequence[LayerCache] | None = None,
    batch_size: int = 32,
) -> tuple[Float[np.ndarray, " I"], Bool[np.ndarray, " I"]]:
    """The answer's log-probability under each intervention, and whether it stays the likeliest.

    All interventions have the same shapes, so that one compilation serves them all.

    Args:
      model: The model.
      reading: The prompt with its answer.
      interventions: What is taken away; an intervention without keys changes nothing.
      values: What stands in its place (`replacements`); None: it is hidden.
      batch_size: How many interventions are made at a time.

    Returns:
      The natural log-probability of the answer, and whether each of its tokens is the likeliest
      one.
    """
    count = len(interventions.keys)
    width = reading.batch.tokens.shape[1] - int(reading.first)
    found = []
    for start in range(0, count, batch_size):

        def some(x: AnyArray, start: int = start) -> Array:
            own = np.asarray(x)[start : start + batch_size]
            return jnp.asarray(np.pad(own, ((0, batch_size - len(own)), (0, 0))))

        chosen = jax.tree.map(some, interventions)
        held = None if values is None else list(values)
        found.append(_answers(model.structure, width, model.state, reading, chosen, held))
    logprobs, greedy = (
        np.concatenate([np.asarray(x) for x in y]) for y in zip(*found, strict=True)
    )
    return logprobs[:count], greedy[:count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(
    structure: Structure,
    width: int,
    state: nnx.State,
    reading: Reading,
    interventions: Interventions,
    values: list[LayerCache] | None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """One batch of interventions."""
    model: MLLM = nnx.merge(structure.graphdef, state)
    rows, virtual = len(interventions.keys), model.tuning.num_virtual_tokens
    layers = jnp.asarray(interventions.layers).T  # [L, B]
    keys = jnp.pad(jnp.asarray(interventions.keys), ((0, 0), (virtual, 0)))
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), reading.batch)
    caches, writes = [], []
    for layer, cache in enumerate(reading.caches):
        if values is None:
            shape = (rows, *cache.k.shape[1:])
            caches.append(jax.tree.map(lambda x, s=shape: jnp.broadcast_to(x, s), cache))
            continue
        taken = (keys & layers[layer][:, None])[:, None, :, None]
        own = values[layer]
        caches.append(jax.tree.map(lambda x, y, t=taken: jnp.where(t, y, x), cache, own))
    chunk = PrefillChunk(caches, jnp.asarray(reading.first), width)
    if values is None:
        readers = interventions.readers
        reads = jnp.ones((rows, width), bool) if readers is None else chunk.select(readers)
        hidden = reads[:, :, None] & keys[:, None, :]
        writes = [(MASK, AttachedWrite(functools.partial(_hide, hidden), {"on": layers}))]
    queries = jnp.broadcast_to(jnp.asarray(reading.queries), (rows, len(reading.queries)))
    out = model(batch, queries=queries, chunk=chunk, writes=writes)
    logs = jax.nn.log_softmax(model.llm.logits(out.hidden))
    targets = jnp.asarray(reading.targets)[None, :, None]
    each = jnp.take_along_axis(logs, jnp.broadcast_to(targets, (rows, *targets.shape[1:])), axis=2)
    weights = jnp.asarray(reading.weights)
    likeliest = (logs.argmax(-1) == jnp.asarray(reading.targets)) | (weights == 0)
    return (each[..., 0] * weights).sum(1), likeliest.all(1)


def _hide(hidden: Bool[Array, "B S T"], params: Params, mask: Bool[Array, "B S T"]) -> Array:
    """The mask of one layer without what is hidden in it."""
    return mask & ~(hidden & params["on"][:, None, None])
