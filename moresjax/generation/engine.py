"""Generation: a jitted prefill and one jitted while-loop of decode steps.

Axis legend: B rows, S prompt tokens, G new tokens, T = P + S + G cache length (P attached slots),
L layers.

Prefill runs the whole model; decoding runs the bare LLM on unstacked layers, so that each layer's
cache is a buffer of its own that XLA updates in place. Methods that cannot act on a generated token
are dropped from the decode model: with MoReS attached, the decode program is that of the base LLM.

Rows usually start and stop together. They are *rolling* when they are given a limit each: then
every row has its own place in the cache, and rows that have ended make room for others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import Batch, TokenKind, TokenLayout, valid_mask
from moresjax.core.ops import write_at
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.generation.beam import Beams, beam_search
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.state import DecodeConfig, DecodeState, Rolling, blank, count_stats, insert
from moresjax.models.block import LayerCache
from moresjax.models.mllm import MLLM, Part
from moresjax.sharding.mesh import batch_shards, constrain_batch_sharding, use_mesh
from moresjax.tuning.attach import extend_layout
from moresjax.tuning.base import Probe

SCORED = 8  # tokens per row whose logits are in memory at a time


@pytree_dataclass
class Generation:
    """What was generated.

    Attributes:
      tokens: new token ids `[B, G]`, the pad id after the end.
      length: number of new tokens per row, the end token included `[B]`.
      stats: per probe, its statistics summed over the queries that gave the new tokens; leaves have
        leading axes `[L, B]`.
      logprobs: natural log-probabilities of the new tokens under the model, before any sampling
        setting `[B, G]`, 0 after the end; None when not asked for.
    """

    tokens: Int[AnyArray, "B G"]
    length: Int[AnyArray, " B"]
    stats: dict
    logprobs: Float[AnyArray, "B G"] | None = None


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of the first tokens of many prompts (`[N, K, P + .., H]` for N different
    beginnings), and how many tokens."""

    caches: list[LayerCache]
    length: int


@jax.jit
def _join(*caches: list[LayerCache]) -> list[LayerCache]:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *caches)


def join(one: Prefix, other: Prefix) -> Prefix:
    """The beginnings of both, which are equally long."""
    return Prefix(_join(one.caches, other.caches), one.length)


class Engine:
    """Generates with a model.

    Args:
      model: the model; it is not changed. One that is only described can be lowered.
      eos_ids: tokens that end a row.
      pad_id: what fills a row after its end.
      probes: statistics to accumulate.
      mesh: that the parameters are placed on; rows are split over it.
    """

    def __init__(
        self,
        model: MLLM,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        probes: Sequence[Probe] = (),
        mesh: Mesh | None = None,
    ):
        model = _unstacked(model)  # once: both programs use the same arrays
        self._prefill = nnx.split(model)
        self._decode = nnx.split(_decode_model(model))
        self._rules = DecodeConfig(tuple(eos_ids), pad_id)
        self._probes = tuple(probes)
        self._mesh = mesh
        self.num_virtual_tokens: int = model.tuning.num_virtual_tokens
        self.parts: int = 1 if mesh is None else batch_shards(mesh)

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        beams: Beams | None = None,
    ) -> Generation:
        """Continues every row by at most `max_new_tokens` tokens.

        Rows may be padded on either side; a row's continuation does not depend on the others.
        Compiles once per batch shape, `max_new_tokens` and `sampling`.

        Args:
          batch: the prompts.
          max_new_tokens: at most this many tokens each.
          sampling: how tokens are chosen.
          seeds: of the rows' draws; default: `sampling.seed` for every row.
          logprobs: whether to return log-probabilities.
          beams: of a beam search instead of the choice of one token after the other.

        Raises:
          UserError: for a beam search with sampling, log-probabilities or probes.
        """
        options = {"sampling": sampling, "seeds": seeds, "logprobs": logprobs}
        if beams is None or beams.num_beams == 1:
            return self.decode(self.prefill(batch, max_new_tokens, **options))
        beams.check(sampling, logprobs=logprobs, probes=self._probes)
        _check_new(max_new_tokens)
        _, options = self._options(batch, sampling, None, False, None)
        options |= {"new": max_new_tokens, "beams": beams}
        models = *self._prefill, *self._decode
        tokens, length = self._run(_search, *models, batch, **options)
        return Generation(tokens, length, {})

    def prefill(
        self,
        batch: Batch,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        limits: Sequence[int] | None = None,
        room: int = 0,
        prefix: Prefix | None = None,
        beginnings: Sequence[int] | None = None,
    ) -> DecodeState:
        """The first half of `generate`: reads the prompts and chooses the first new tokens.

        Args:
          batch, max_new_tokens, sampling, seeds, logprobs: as in `generate`.
          limits: of each row's new tokens; makes the rows rolling.
          room: cache length, if it is not to be P + S + G; see `grow`.
          prefix: what right-padded rows begin with; it is not read again.
          beginnings: for every row which one it begins with; default: the first.
        """
        _check_new(max_new_tokens)
        data, options = self._options(batch, sampling, seeds, logprobs, limits)
        options |= {"new": max_new_tokens, "room": room, "probes": self._probes}
        prefix, count = _after(batch, prefix, beginnings)
        options["count"] = count
        return self._run(_prefill, *self._prefill, batch, *data, prefix, **options)

    def read_prefix(self, batch: Batch, prefix: Prefix | None = None) -> Prefix:
        """Reads what many prompts begin with.

        Args:
          batch: right-padded rows of equally many tokens.
          prefix: what these begin with; it is not read again.
        """
        length = int((np.asarray(batch.layout.kind[0]) != TokenKind.PAD).sum())
        prefix, count = _after(batch, prefix, None)
        return Prefix(self._run(_read_prefix, *self._prefill, batch, prefix, count=count), length)

    def extend(
        self,
        batch: Batch,
        caches: list[LayerCache],
        first: int,
        count: int,
        max_new_tokens: int,
        *,
        limits: Sequence[int],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        room: int = 0,
    ) -> DecodeState:
        """`prefill` of right-padded rows whose first tokens are in the caches already.

        Args:
          batch: the whole prompts, of which tokens `first` to `first + count` are read: text only.
          caches: keys and values; they are consumed.
          first, count: all tokens after these must be padding.
          max_new_tokens, limits, sampling, seeds, room: as in `prefill`.
        """
        room = max(self.num_virtual_tokens + batch.layout.shape[1] + max_new_tokens, room)
        # Caches that have to grow do so here: donated buffers cannot.
        caches = [jax.tree.map(lambda x: _lengthened(x, 2, room), cache) for cache in caches]
        data, options = self._options(batch, sampling, seeds, False, limits)
        options |= {
            "new": max_new_tokens,
            "room": room,
            "count": count,
            "ahead": self.num_virtual_tokens,
        }
        start = jnp.int32(first)
        return self._run(_extend, *self._decode, batch, caches, start, *data, **options)

    def _options(self, batch, sampling, seeds, logprobs, limits) -> tuple[tuple, dict]:
        """Arguments of the programs: data, and what is compiled in."""
        if seeds is None:
            seeds = [sampling.seed] * len(batch.tokens)
        seeds = jnp.asarray(seeds, jnp.uint32) if sampling.temperature else None
        limits = None if limits is None else jnp.asarray(limits, jnp.int32)
        sampling = dataclasses.replace(sampling, seed=0)
        rules = dataclasses.replace(self._rules, sampling=sampling, logprobs=logprobs)
        return (seeds, limits), {"rules": rules}

    def decode(self, progress: DecodeState) -> Generation:
        """The second half: the other new tokens. The caches are consumed."""
        done = self._run(_decode, *self._decode, progress, probes=self._probes)
        return Generation(done.tokens, done.length, done.stats, done.logprobs)

    def insert(
        self, carry: DecodeState | None, new: DecodeState, slots: Sequence[int], rows: int
    ) -> DecodeState:
        """Rolling rows with the rows of `new` in some places; `carry` is consumed.

        Args:
          carry: the rows; None: `rows` empty places.
          new: as many rows as `slots`.
          slots: their places.
          rows: the size of the batch.
        """
        carry = self._run(_blank, new, rows=rows) if carry is None else carry
        return self._run(_insert, carry, new, jnp.asarray(slots))

    def grow(self, carry: DecodeState, room: int) -> DecodeState:
        """The same rolling rows with longer caches."""
        return self._run(_grow, carry, room=room)

    def advance(self, carry: DecodeState, steps: int, enough: int | None = None) -> DecodeState:
        """Further tokens of rolling rows; `carry` is consumed.

        Args:
          carry: the rows, with room for these tokens.
          steps: at most so many tokens each.
          enough: so many ended rows are reason to stop; default: all rows.
        """
        enough = len(carry.done) if enough is None else enough
        carry = carry.replace(left=jnp.int32(steps), enough=jnp.int32(enough))
        carry = self._run(_decode, *self._decode, carry, probes=self._probes)
        return carry.replace(left=None, enough=None)

    def score(
        self,
        batch: Batch,
        queries: Int[AnyArray, "B Q"],
        targets: Int[AnyArray, "B Q"],
        prefix: Prefix | None = None,
        beginnings: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
        """`score_batch` of the engine's model.

        Args:
          batch, queries, targets: as there; no query may belong to the prefix.
          prefix, beginnings: as in `prefill`.
        """
        prefix, count = _after(batch, prefix, beginnings)
        return self._run(score_batch, *self._prefill, batch, queries, targets, prefix, count=count)

    def _run(self, program: Callable, *arguments, **options):
        """One of the programs below, traced for the mesh."""
        with use_mesh(self._mesh):
            return program(*arguments, **options)

    @property
    def parameters(self) -> tuple[nnx.State, nnx.State]:
        """What the prefill and what the decode program is given."""
        return self._prefill[1], self._decode[1]

    def lower_prefill(self, batch: Batch, max_new_tokens: int) -> jax.stages.Lowered:
        """The lowered prefill program for a batch of this shape, for inspection."""
        arguments, options = self._greedy(batch, max_new_tokens)
        return _prefill.lower(*arguments, **options)

    def lower_decode(self, batch: Batch, max_new_tokens: int) -> jax.stages.Lowered:
        """The lowered decode program for a batch of this shape, for inspection."""
        arguments, options = self._greedy(batch, max_new_tokens)
        return self.lower_steps(_prefill.eval_shape(*arguments, **options))

    def lower_steps(self, carry: DecodeState) -> jax.stages.Lowered:
        """The lowered decode program for rows of these shapes and shardings."""
        return _decode.lower(*self._decode, carry, probes=self._probes)

    def _greedy(self, batch: Batch, new: int) -> tuple[tuple, dict]:
        """Arguments of the prefill program for greedy choice."""
        data, options = self._options(batch, GREEDY, None, False, None)
        options |= {"new": new, "room": 0, "probes": self._probes, "count": 0}
        return (*self._prefill, batch, *data, None), options


def _unstacked(model: MLLM) -> MLLM:
    model = nnx.clone(model)
    model.llm.unstack()
    return model


def _decode_model(model: MLLM) -> MLLM:
    """The LLM with the methods that act while decoding, and nothing of the vision side."""
    model = nnx.clone(model)
    model.tuning = model.tuning.for_decoding()
    model.config = dataclasses.replace(model.config, vision=None, connector="identity")
    model.tuning.config = model.config
    del model.vision, model.connector
    return model


@functools.partial(jax.jit, static_argnames=("graphdef", "new", "room", "probes", "rules", "count"))
def _prefill(
    graphdef, state, batch: Batch, seeds, limits, prefix, *, new, room, probes, rules, count
) -> DecodeState:
    model = nnx.merge(graphdef, state)
    part = _part(model, batch, prefix, count)
    carry, logits = _read(model, batch, seeds, limits, new, room, probes, rules, part)
    return carry.append(logits)


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def _read_prefix(graphdef, state, batch: Batch, prefix, *, count) -> list[LayerCache]:
    model = nnx.merge(graphdef, state)
    part = _part(model, batch, prefix, count)
    # One output is asked for: in the last layer, the others need keys and values only.
    one = jnp.zeros((len(batch.tokens), 1), jnp.int32) + (0 if part is None else part.first)
    return model(batch, queries=one, keep_cache=True, part=part).cache


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def score_batch(
    graphdef,
    state,
    batch: Batch,
    queries: Int[AnyArray, "B Q"],
    targets: Int[AnyArray, "B Q"],
    prefix=None,
    *,
    count: int = 0,
) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
    """Log-probability of every target token, the next one of its query, and whether it is the most
    likely one. Logits are computed for the queries only, of `SCORED` per row at a time."""
    model = nnx.merge(graphdef, state)
    part = _part(model, batch, prefix, count)
    hidden = model(batch, queries=queries, part=part).hidden
    rows, asked = queries.shape
    pieces = -(-asked // SCORED)

    def cut(x):
        x = _lengthened(jnp.asarray(x), 1, pieces * SCORED)
        return jnp.moveaxis(x.reshape(rows, pieces, SCORED, *x.shape[2:]), 1, 0)

    def score(piece):
        hidden, targets = piece
        logits = model.llm.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[..., 0]
        chosen = chosen - jax.nn.logsumexp(logits, axis=-1)
        return chosen, logits.argmax(-1) == targets

    found = jax.lax.map(score, (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :asked], found)


def _after(batch: Batch, prefix: Prefix | None, beginnings: Sequence[int] | None):
    """Arguments of the programs: the prefix, and how many tokens follow it at most."""
    if prefix is None:
        return None, 0
    rows, length = batch.layout.shape
    chosen = np.zeros(rows, np.int32) if beginnings is None else np.asarray(beginnings, np.int32)
    return (prefix.caches, jnp.int32(prefix.length), chosen), length - rounded(prefix.length)


def _part(model: MLLM, batch: Batch, prefix, count: int) -> Part | None:
    """What is left to read after the prefix."""
    if prefix is None:
        return None
    caches, first, chosen = prefix
    total = model.tuning.num_virtual_tokens + batch.layout.shape[1]

    def shared(x):
        return constrain_batch_sharding(_lengthened(x[:, :, :total], 2, total)[chosen])

    return Part(jax.tree.map(shared, caches), first, count)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "decode_graphdef", "new", "beams", "rules")
)
def _search(graphdef, state, decode_graphdef, decode_state, batch, *, new, beams, rules):
    """Prefill and all steps of a beam search."""
    carry, logits = _read(nnx.merge(graphdef, state), batch, None, None, new, 0, (), rules)
    step = functools.partial(_step, nnx.merge(decode_graphdef, decode_state), ())
    return beam_search(carry, logits, beams, step)


def _read(model, batch, seeds, limits, new, room, probes, rules, part=None):
    """Reads the prompts: the state after them and the logits of the first new token."""
    last = _last(batch)
    out = model(batch, probes=probes, queries=last[:, None], keep_cache=True, part=part)
    carry = _begin(
        batch, out.cache, last, seeds, limits, model.tuning.num_virtual_tokens, new, room, rules
    )
    logits = model.llm.logits(out.hidden[:, 0])
    carry = carry.replace(stats=count_stats(out.stats, ~carry.done))
    return _with_seen(carry, batch, logits), logits


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "new", "room", "count", "ahead", "rules"),
    donate_argnames=("caches",),
)
def _extend(
    graphdef, state, batch, caches, first, seeds, limits, *, new, room, count, ahead, rules
) -> DecodeState:
    model = nnx.merge(graphdef, state)
    last = _last(batch)
    carry = _begin(batch, caches, last, seeds, limits, ahead, new, room, rules)

    def part(x, start):
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, count, axis=1)

    step = jax.tree.map(lambda x: part(x, first + ahead), carry.keys)
    out = model.decode_step(
        part(batch.tokens, first), step, carry.caches, carry.keys, first + ahead, (), carry.adapter
    )
    hidden = jnp.take_along_axis(out.hidden, (last - first)[:, None, None], axis=1)[:, 0]
    logits = model.llm.logits(hidden)
    return _with_seen(carry.replace(caches=out.cache), batch, logits).append(logits)


def _with_seen(carry: DecodeState, batch: Batch, logits) -> DecodeState:
    """With the tokens of the prompts, where the choice needs them."""
    if carry.rules.sampling.repetition_penalty == 1:
        return carry
    # The ids under visual tokens mean nothing.
    word = valid_mask(batch.layout) & (jnp.asarray(batch.layout.image) < 0)
    rows = jnp.arange(len(logits))[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, jnp.asarray(batch.tokens)].max(word)
    return carry.replace(seen=seen)


def _check_new(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _last(batch: Batch):
    """Row index of every row's last token."""
    return batch.layout.shape[1] - 1 - jnp.argmax(valid_mask(batch.layout)[:, ::-1], axis=1)


def _lengthened(x: jax.Array, axis: int, length: int, fill: int = 0) -> jax.Array:
    if x.shape[axis] == length:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pads, constant_values=fill)


def _with_room(keys: TokenLayout, caches: list[LayerCache], room: int):
    """Layout and caches with places up to `room`."""
    longer = jax.tree.map(lambda x: _lengthened(jnp.asarray(x), 1, room), keys)
    longer = longer.replace(image=_lengthened(jnp.asarray(keys.image), 1, room, -1))
    return longer, [jax.tree.map(lambda x: _lengthened(x, 2, room), cache) for cache in caches]


@functools.partial(jax.jit, static_argnames="room")
def _grow(carry: DecodeState, *, room: int) -> DecodeState:
    keys, caches = _with_room(carry.keys, carry.caches, room)
    return carry.replace(keys=keys, caches=caches)


def _begin(batch, caches, last, seeds, limits, ahead, new, room, rules) -> DecodeState:
    """The state before the first new token."""
    rows, length = batch.layout.shape
    total = room or ahead + length + new

    def at_last(x):
        return jnp.take_along_axis(jnp.asarray(x), last[:, None], axis=1)[:, 0]

    keys, caches = _with_room(extend_layout(batch.layout, ahead), caches, total)
    rolling = None
    if limits is not None:
        # Padding on the right is overwritten.
        rolling = Rolling(last.astype(jnp.int32) + ahead + 1, limits)
    return DecodeState(
        step=jnp.zeros((), jnp.int32) if rolling is None else jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, new), rules.pad, jnp.int32),
        done=jnp.zeros(rows, bool),
        length=jnp.zeros(rows, jnp.int32),
        position=at_last(batch.layout.position) + ahead,
        document=at_last(batch.layout.document),
        adapter=batch.adapter,
        keys=keys,
        caches=caches,
        stats={},
        rules=rules,
        seeds=seeds,
        logprobs=jnp.zeros((rows, new)) if rules.logprobs else None,
        rolling=rolling,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "probes"), donate_argnames=("carry",))
def _decode(graphdef, state, carry: DecodeState, *, probes) -> DecodeState:
    # The whole carry is returned, so that the donated caches are the buffers that are written.
    model = nnx.merge(graphdef, state)

    def one_step(carry):
        carry, logits = _step(model, probes, carry)
        return carry.append(logits)

    return jax.lax.while_loop(lambda carry: carry.goes_on, one_step, carry)


def _step(model: MLLM, probes, carry: DecodeState):
    """Reads the tokens chosen last: the state after them and the logits of the next ones."""
    index = carry.index
    kind = jnp.where(carry.done, int(TokenKind.PAD), int(TokenKind.ANSWER))
    position = carry.position + 1
    step = TokenLayout.of_step(kind, position, carry.document, carry.keys.visual_tokens)
    keys = jax.tree.map(lambda x, y: write_at(x, y, index, 1), carry.keys, step)
    out = model.decode_step(
        carry.last_token, step, carry.caches, keys, index, probes, carry.adapter
    )
    stats = jax.tree.map(jnp.add, carry.stats, count_stats(out.stats, ~carry.done))
    carry = carry.replace(position=position, keys=keys, caches=out.cache, stats=stats)
    return carry, model.llm.logits(out.hidden[:, 0])


_blank = jax.jit(blank, static_argnames="rows")
_insert = jax.jit(insert, donate_argnames=("carry",))


def bucket(length: int, smallest: int = 32) -> int:
    """The padded length for a prompt: powers of two and the quarters between them, in steps of at
    least half of `smallest`."""
    step = max(2 ** (max(length - 1, 1).bit_length() - 3), smallest // 2)
    return max(-(-length // step) * step, smallest)


def rounded(length: int) -> int:
    """The length of a prefix up to a multiple of 16: about equal prefixes share programs."""
    return -(-length // 16) * 16
