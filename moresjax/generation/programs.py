"""The jitted programs of generation: reading prompts, decoding, beam search, scoring.

Axis legend: B rows, N rows that are read together, S prompt tokens, G new tokens, T cache length,
Q scored tokens per row, V vocabulary.

A program takes one frozen dataclass of what is compiled in (`static`) and one pytree of arrays
(`data`); calls that agree in the former and in the shapes of the latter share a compilation. What a
program consumes, that is a decode state or caches whose buffers it writes into, is an argument of
its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from moresjax.core.layout import Batch, TokenKind, TokenLayout, valid_mask
from moresjax.core.ops import write_at
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.generation.beam import Beams, beam_search
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG
from moresjax.generation.lengths import lengthened, num_pieces
from moresjax.generation.sampling import RowChoice
from moresjax.generation.state import DecodeConfig, DecodeState, RowBudgets, fold_stats
from moresjax.models.block import LayerCache
from moresjax.models.mllm import MLLM, PrefillChunk
from moresjax.sharding.mesh import constrain_batch_sharding
from moresjax.tuning.masks import extend_layout
from moresjax.tuning.probes import Probe


@pytree_dataclass
class PrefixData:
    """Prefix caches as a program takes them.

    Attributes:
      caches: Keys and values of N prefixes, one per layer.
      length: Their common number of tokens.
      index: The prefix that each row begins with `[B]`.
    """

    caches: list[LayerCache]
    length: Int[AnyArray, ""]
    index: Int[AnyArray, " B"]


@pytree_dataclass
class PromptData:
    """The arrays of a program that reads prompts.

    Attributes:
      params: The model's parameters.
      batch: The whole prompts.
      seeds: The seed of each row; None for greedy choice.
      limits: The most new tokens of each row, for continuously batched rows; else None.
      prefix: What the rows begin with and is not read again, or None.
      virtual: Which virtual tokens each row has; None: all.
      choice: How each row's tokens are chosen; None where all rows have the same settings.
    """

    params: nnx.State
    batch: Batch
    seeds: UInt[AnyArray, " B"] | None = None
    limits: Int[AnyArray, " B"] | None = None
    prefix: PrefixData | None = None
    virtual: Bool[AnyArray, "B P"] | None = None
    choice: RowChoice | None = None


@pytree_dataclass
class ScoreData:
    """The arrays of `score`.

    Attributes:
      params: The model's parameters.
      batch: The whole rows.
      queries: Columns whose next token is scored; none of them belongs to a prefix.
      targets: That next token.
      prefix: What the rows begin with and is not read again, or None.
    """

    params: nnx.State
    batch: Batch
    queries: Int[AnyArray, "B Q"]
    targets: Int[AnyArray, "B Q"]
    prefix: PrefixData | None = None


@pytree_dataclass
class SearchData:
    """The arrays of `prefill_and_search`.

    Attributes:
      params: The parameters of the model that reads the prompts.
      decode_params: The parameters of the model that decodes.
      batch: The prompts.
      virtual: Which virtual tokens each row has; None: all.
    """

    params: nnx.State
    decode_params: nnx.State
    batch: Batch
    virtual: Bool[AnyArray, "B P"] | None = None


@dataclasses.dataclass(frozen=True)
class ModelStatic:
    """What is compiled into every program that runs the model on prompts.

    Attributes:
      graphdef: The structure of the model.
      suffix_length: The most tokens of a row that follow its prefix; 0 without prefixes.
    """

    graphdef: nnx.GraphDef
    suffix_length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreStatic(ModelStatic):
    """What is compiled into `score`.

    Attributes:
      logits_bytes: The bytes of logits that are in memory at a time, on each device.
    """

    logits_bytes: int = DEFAULT_ENGINE_CONFIG.logits_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillStatic(ModelStatic):
    """What is compiled into a program that begins a generation.

    Attributes:
      config: How rows end and how tokens are chosen.
      num_virtual_tokens: P, the virtual tokens before each row.
      max_new_tokens: G.
      cache_length: T; 0 stands for P + S + G.
      probes: The statistics that are accumulated.
    """

    config: DecodeConfig
    num_virtual_tokens: int
    max_new_tokens: int
    cache_length: int = 0
    probes: tuple[Probe, ...] = ()


@dataclasses.dataclass(frozen=True)
class SearchStatic:
    """What is compiled into `prefill_and_search`.

    Attributes:
      prefill: What is compiled into the part that reads the prompts.
      decode_graphdef: The structure of the model that decodes.
      beams: The settings of the search.
    """

    prefill: PrefillStatic
    decode_graphdef: nnx.GraphDef
    beams: Beams


@dataclasses.dataclass(frozen=True)
class DecodeStatic:
    """What is compiled into `decode`.

    Attributes:
      graphdef: The structure of the model that decodes.
      probes: The statistics that are accumulated.
    """

    graphdef: nnx.GraphDef
    probes: tuple[Probe, ...] = ()


@functools.partial(jax.jit, static_argnames="static")
def prefill(static: PrefillStatic, data: PromptData) -> DecodeState:
    """Reads the prompts and chooses the first new token of each."""
    model = nnx.merge(static.graphdef, data.params)
    state, logits, stats = _read_prompts(static, model, data)
    return fold_stats(static.probes, stats, state, state.append(logits))


@functools.partial(jax.jit, static_argnames="static")
def read_prefix(static: ModelStatic, data: PromptData) -> list[LayerCache]:
    """Keys and values of rows that are prefixes of prompts."""
    model = nnx.merge(static.graphdef, data.params)
    chunk = _prefill_chunk(model, data.batch, data.prefix, static.suffix_length)
    # One output is asked for: in the last layer, the others need keys and values only.
    one = jnp.zeros((len(data.batch.tokens), 1), jnp.int32) + (0 if chunk is None else chunk.first)
    return model(data.batch, queries=one, keep_cache=True, chunk=chunk, unfinished=True).cache


@functools.partial(jax.jit, static_argnames="static", donate_argnames="caches")
def append_prompt(
    static: PrefillStatic, data: PromptData, caches: list[LayerCache], first: Int[Array, ""]
) -> DecodeState:
    """Reads the tokens of right-padded text rows from `first` on and chooses the first new token.

    Args:
      static: Its `suffix_length` tells how many tokens are read.
      data: Whole prompts, and parameters of the model that decodes.
      caches: Keys and values of what stands before `first`, of length T; they are consumed.
      first: The column of the first token that is read.
    """
    model, count = nnx.merge(static.graphdef, data.params), static.suffix_length
    last = _last_column(data.batch)
    state = _begin(static, data, caches, last)

    def chunk(x: AnyArray, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, count, axis=1)

    index = first + static.num_virtual_tokens
    layout = jax.tree.map(lambda x: chunk(x, index), state.cache_layout)
    tokens = chunk(data.batch.tokens, first)
    out = model.decode_step(
        tokens, layout, state.caches, state.cache_layout, index, (), state.adapter
    )
    hidden = jnp.take_along_axis(out.hidden, (last - first)[:, None, None], axis=1)[:, 0]
    logits = model.llm.logits(hidden)
    return _with_seen(state.replace(caches=out.cache), data.batch, logits).append(logits)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def decode(static: DecodeStatic, params: nnx.State, state: DecodeState) -> DecodeState:
    """Steps until no row is unfinished; the state is consumed.

    The whole state is returned, so that the donated caches are the buffers that are written.
    """
    model = nnx.merge(static.graphdef, params)

    def one_step(state: DecodeState) -> DecodeState:
        read, logits, stats = _step(model, static.probes, state)
        return fold_stats(static.probes, stats, read, read.append(logits))

    return jax.lax.while_loop(lambda state: state.unfinished, one_step, state)


@functools.partial(jax.jit, static_argnames="static")
def prefill_and_search(
    static: SearchStatic, data: SearchData
) -> tuple[Int[AnyArray, "B G"], Int[AnyArray, " B"]]:
    """Tokens and length of each row's best continuation: prefill and all steps of a beam search."""
    model = nnx.merge(static.prefill.graphdef, data.params)
    state, logits, _ = _read_prompts(
        static.prefill, model, PromptData(data.params, data.batch, virtual=data.virtual)
    )
    decoder = nnx.merge(static.decode_graphdef, data.decode_params)

    def step(state: DecodeState) -> tuple[DecodeState, Float[Array, "..."]]:
        return _step(decoder, (), state)[:2]

    return beam_search(state, logits, static.beams, step)


@functools.partial(jax.jit, static_argnames="static")
def score(static: ScoreStatic, data: ScoreData) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
    """Log-probability of every target token, and whether it is the most likely one.

    Logits are computed for the queries only, as many at a time as `logits_bytes` hold.
    """
    model = nnx.merge(static.graphdef, data.params)
    chunk = _prefill_chunk(model, data.batch, data.prefix, static.suffix_length)
    hidden = model(data.batch, queries=data.queries, chunk=chunk).hidden
    rows, asked = data.queries.shape
    pieces = num_pieces(rows, asked, 4 * model.config.llm.vocab_size, static.logits_bytes)
    size = -(-asked // pieces)

    def in_pieces(x: AnyArray) -> Array:
        x = lengthened(jnp.asarray(x), 1, pieces * size)
        return jnp.moveaxis(x.reshape(rows, pieces, size, *x.shape[2:]), 1, 0)

    def score_piece(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = piece
        logits = model.llm.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[..., 0]
        chosen = chosen - jax.nn.logsumexp(logits, axis=-1)
        return chosen, logits.argmax(-1) == targets

    found = jax.lax.map(score_piece, (in_pieces(hidden), in_pieces(data.targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :asked], found)


@functools.partial(jax.jit, static_argnames="cache_length")
def grow(state: DecodeState, cache_length: int) -> DecodeState:
    """The state with longer caches."""
    layout, caches = _with_length(state.cache_layout, state.caches, cache_length)
    return state.replace(cache_layout=layout, caches=caches)


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, new: DecodeState, slots: Int[Array, " N"]) -> DecodeState:
    """The state with the rows of `new` in some of its slots.

    Args:
      state: Continuously batched rows, which are consumed.
      new: The rows that are inserted.
      slots: The row number that each of them gets; a row is dropped if it is B or more.
    """
    stats = jax.tree.map(lambda x, y: x.at[:, slots].set(y, mode="drop"), state.stats, new.stats)
    rest = (x.replace(stats={}) for x in (state, new))
    merged = jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), *rest)
    return merged.replace(stats=stats)


@functools.partial(jax.jit, static_argnames="rows")
def empty_slots(like: DecodeState, rows: int) -> DecodeState:
    """A continuously batched state in which every slot is free: its rows are done.

    Args:
      like: A state of the same fields and lengths, with any number of rows.
      rows: The number of slots.
    """

    def zeros(x: Array) -> Array:
        return jnp.zeros((rows, *x.shape[1:]), x.dtype)

    stats = jax.tree.map(lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype), like.stats)
    state = jax.tree.map(zeros, like.replace(stats={}))
    budgets = RowBudgets(state.budgets.start + 1, state.budgets.limit)
    return state.replace(stats=stats, done=~state.done, budgets=budgets)


def _prefill_chunk(
    model: MLLM, batch: Batch, prefix: PrefixData | None, suffix_length: int
) -> PrefillChunk | None:
    """What is left to read after the prefixes; None: everything."""
    if prefix is None:
        return None
    total = model.tuning.num_virtual_tokens + batch.layout.shape[1]

    def of_rows(x: Shaped[Array, "N ..."]) -> Shaped[Array, "B ..."]:
        return constrain_batch_sharding(lengthened(x[:, :, :total], 2, total)[prefix.index])

    return PrefillChunk(jax.tree.map(of_rows, prefix.caches), prefix.length, suffix_length)


def _read_prompts(
    static: PrefillStatic, model: MLLM, data: PromptData
) -> tuple[DecodeState, Float[Array, "B V"], dict]:
    """The state after the prompts, the first new token's logits, and what probes read."""
    chunk = _prefill_chunk(model, data.batch, data.prefix, static.suffix_length)
    last = _last_column(data.batch)
    out = model(
        data.batch, probes=static.probes, queries=last[:, None], keep_cache=True, chunk=chunk
    )
    assert out.cache is not None  # because it is to be kept
    state = _begin(static, data, out.cache, last)
    logits = model.llm.logits(out.hidden[:, 0])
    return _with_seen(state, data.batch, logits), logits, out.stats


def _begin(
    static: PrefillStatic, data: PromptData, caches: list[LayerCache], last: Int[Array, " B"]
) -> DecodeState:
    """The state before the first new token."""
    batch, num_virtual, new = data.batch, static.num_virtual_tokens, static.max_new_tokens
    rows, length = batch.layout.shape

    def at_last(x: AnyArray) -> Array:
        return jnp.take_along_axis(jnp.asarray(x), last[:, None], axis=1)[:, 0]

    layout, caches = _with_length(
        extend_layout(batch.layout, num_virtual, data.virtual),
        caches,
        static.cache_length or num_virtual + length + new,
    )
    own = num_virtual if data.virtual is None else jnp.asarray(data.virtual).sum(axis=1)
    budgets = None
    if data.limits is not None:
        # Padding on the right is overwritten.
        budgets = RowBudgets(last.astype(jnp.int32) + num_virtual + 1, data.limits)
    return DecodeState(
        step=jnp.zeros((), jnp.int32) if budgets is None else jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, new), static.config.pad_id, jnp.int32),
        done=jnp.zeros(rows, bool),
        length=jnp.zeros(rows, jnp.int32),
        position=at_last(batch.layout.position) + own,
        document=at_last(batch.layout.document),
        adapter=batch.adapter,
        cache_layout=layout,
        caches=caches,
        stats={},
        config=static.config,
        seeds=data.seeds,
        logprobs=jnp.zeros((rows, new)) if static.config.logprobs else None,
        budgets=budgets,
        choice=data.choice,
        likely=static.config.no_likely(rows),
    )


def _step(
    model: MLLM, probes: tuple[Probe, ...], state: DecodeState
) -> tuple[DecodeState, Float[Array, "B V"], dict]:
    """Reads the tokens chosen last.

    Returns:
      The state after them, the logits of the next ones, and what the probes read.
    """
    index = state.cache_index
    kind = jnp.where(state.done, int(TokenKind.PAD), int(TokenKind.ANSWER))
    position = state.position + 1
    step = TokenLayout.of_step(kind, position, state.document, state.cache_layout.visual_tokens)
    layout = jax.tree.map(lambda x, y: write_at(x, y, index, 1), state.cache_layout, step)
    out = model.decode_step(
        state.last_token, step, state.caches, layout, index, probes, state.adapter
    )
    state = state.replace(position=position, cache_layout=layout, caches=out.cache)
    return state, model.llm.logits(out.hidden[:, 0]), out.stats


def _with_seen(state: DecodeState, batch: Batch, logits: Float[Array, "B V"]) -> DecodeState:
    """The state with the tokens of the prompts, if a repetition penalty needs them."""
    if state.config.sampling.repetition_penalty in (None, 1):
        return state
    # The ids under visual tokens mean nothing.
    word = valid_mask(batch.layout) & (jnp.asarray(batch.layout.image) < 0)
    rows = jnp.arange(len(logits))[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, jnp.asarray(batch.tokens)].max(word)
    return state.replace(seen=seen)


def _with_length(
    layout: TokenLayout, caches: list[LayerCache], length: int
) -> tuple[TokenLayout, list[LayerCache]]:
    """Layout and caches, padded to a cache length."""
    longer = jax.tree.map(lambda x: lengthened(jnp.asarray(x), 1, length), layout)
    longer = longer.replace(image=lengthened(jnp.asarray(layout.image), 1, length, -1))
    return longer, [jax.tree.map(lambda x: lengthened(x, 2, length), cache) for cache in caches]


def _last_column(batch: Batch) -> Int[Array, " B"]:
    """The column of every row's last token."""
    return batch.layout.shape[1] - 1 - jnp.argmax(valid_mask(batch.layout)[:, ::-1], axis=1)
