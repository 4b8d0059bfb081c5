"""The generation engine: a model made ready to read prompts, to decode and to score.

Axis legend: B rows, S prompt tokens, G new tokens, P virtual tokens before a row, T = P + S + G
cache length, L layers, Q scored tokens per row.

Prefill runs the whole model; decoding runs the bare LLM on unstacked layers, so that each layer's
cache is a buffer of its own that XLA updates in place. Methods that cannot act on a generated token
are dropped from the decode model: with MoReS attached, the decode program is that of the base LLM.

The rows of a plain batch start and stop together. Rows that are given a limit each are batched
continuously: every row has its own place in the cache, and rows that are done make room for others
(see `moresjax.generation.scheduler`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.layout import Batch, TokenKind
from moresjax.core.types import AnyArray
from moresjax.generation import programs
from moresjax.generation.beam import Beams
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.lengths import lengthened, rounded
from moresjax.generation.sampling import GREEDY, RowChoice, Sampling
from moresjax.generation.state import DecodeConfig, DecodeState, Generation, PrefixCache
from moresjax.models.block import LayerCache
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import batch_shards, use_mesh
from moresjax.tuning.attach import Tuning
from moresjax.tuning.probes import Probe


class Engine:
    """Generates with a model.

    Attributes:
      config: The knobs.
      num_virtual_tokens: P, the virtual tokens before each row.
      num_shards: How many parts of a batch lie on different devices.
      changes: How often what the tuning was given has been changed.

    Args:
      model: The model; it is not changed. An abstract one (shapes only) can be lowered.
      eos_ids: Tokens that end a row.
      pad_id: The token that fills a row after its end.
      probes: The statistics to accumulate.
      mesh: The mesh that the parameters are placed on; rows are split over it.
      config: The knobs.
    """

    def __init__(
        self,
        model: MLLM,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        probes: Sequence[Probe] = (),
        mesh: Mesh | None = None,
        config: EngineConfig = DEFAULT_ENGINE_CONFIG,
    ) -> None:
        model = _unstacked(model)  # once: both programs use the same arrays
        self._graphdef, self._params = nnx.split(model)
        decode_graphdef, self._decode_params = nnx.split(_decode_model(model))
        self._decode_static = programs.DecodeStatic(decode_graphdef, tuple(probes))
        self._decode_config = DecodeConfig(tuple(eos_ids), pad_id)
        self._probes = tuple(probes)
        self._mesh = mesh
        self.config, self.changes = config, 0
        self.num_virtual_tokens: int = model.tuning.num_virtual_tokens
        self._tuning_graphdef = nnx.graphdef(model.tuning)
        self._virtual = _host(model.tuning.virtual_table())
        self.num_shards: int = 1 if mesh is None else batch_shards(mesh)

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
          batch: The prompts.
          max_new_tokens: The most new tokens of a row.
          sampling: How tokens are chosen.
          seeds: The seed of each row's draws; default: `sampling.seed` for every row.
          logprobs: Whether to return log-probabilities.
          beams: A beam search instead of the choice of one token after the other.

        Raises:
          UserError: A beam search is combined with sampling, log-probabilities or probes.
        """
        if beams is None or beams.num_beams == 1:
            options = {"sampling": sampling, "seeds": seeds, "logprobs": logprobs}
            return self.decode(self.prefill(batch, max_new_tokens, **options))
        beams.check(sampling, logprobs=logprobs, probes=self._probes)
        static = self._prefill_static(max_new_tokens, sampling, probes=())
        static = programs.SearchStatic(static, self._decode_static.graphdef, beams)
        virtual = self._own_virtual(batch)
        data = programs.SearchData(self._params, self._decode_params, batch, virtual)
        with use_mesh(self._mesh):
            tokens, length = programs.prefill_and_search(static, data)
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
        cache_length: int = 0,
        prefix: PrefixCache | None = None,
        prefix_index: Sequence[int] | None = None,
        choice: RowChoice | None = None,
        listed: tuple[int, int] = (0, 1),
    ) -> DecodeState:
        """Reads the prompts and chooses the first new token of each: the first half of `generate`.

        Args:
          batch: The prompts.
          max_new_tokens: The most new tokens of a row.
          sampling: How tokens are chosen.
          seeds: The seed of each row's draws; default: `sampling.seed` for every row.
          logprobs: Whether to keep log-probabilities.
          limits: The most new tokens of each row; makes the rows continuously batched.
          cache_length: T, if it is not to be P + S + G; see `grow`.
          prefix: What right-padded rows begin with; it is not read again.
          prefix_index: The prefix that each row begins with; default: the first.
          choice: How the tokens of each row are chosen, with `seeds`; of `sampling`, the repetition
            penalty holds for all rows. Default: as `sampling` says.
          listed: How many likely tokens are listed for rows whose `choice` asks for them, and for
            how many of a row's last new tokens.
        """
        static = self._prefill_static(max_new_tokens, sampling, logprobs, self._probes)
        config = dataclasses.replace(static.config, listed=listed[0], listed_steps=listed[1])
        found, suffix = _prefix_data(batch, prefix, prefix_index)
        static = dataclasses.replace(
            static, config=config, cache_length=cache_length, suffix_length=suffix
        )
        data = self._prompt_data(batch, sampling, seeds, limits, choice)
        data = dataclasses.replace(data, prefix=found)
        with use_mesh(self._mesh):
            return programs.prefill(static, data)

    def read_prefix(self, batch: Batch, prefix: PrefixCache | None = None) -> PrefixCache:
        """Reads what many prompts begin with.

        Args:
          batch: Right-padded rows of equally many tokens.
          prefix: What these begin with; it is not read again.
        """
        length = int((np.asarray(batch.layout.kind[0]) != TokenKind.PAD).sum())
        found, suffix = _prefix_data(batch, prefix, None)
        static = programs.ModelStatic(self._graphdef, suffix)
        data = programs.PromptData(self._params, batch, prefix=found)
        with use_mesh(self._mesh):
            return PrefixCache(programs.read_prefix(static, data), length)

    def append_prompt(
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
        cache_length: int = 0,
    ) -> DecodeState:
        """`prefill` of right-padded rows whose first tokens are in the caches already.

        Args:
          batch: The whole prompts, of which tokens `first` to `first + count` are read: text only.
          caches: Keys and values; they are consumed.
          first: The column of the first token that is read.
          count: How many tokens are read; all after them must be padding.
          max_new_tokens: The most new tokens of a row.
          limits: The most new tokens of each row.
          sampling: How tokens are chosen.
          seeds: The seed of each row's draws; default: `sampling.seed` for every row.
          cache_length: The least length T of the caches afterwards.
        """
        needed = self.num_virtual_tokens + batch.layout.shape[1] + max_new_tokens
        length = max(needed, cache_length)
        # Caches that have to grow do so here: donated buffers cannot.
        caches = [jax.tree.map(lambda x: lengthened(x, 2, length), cache) for cache in caches]
        static = dataclasses.replace(
            self._prefill_static(max_new_tokens, sampling, probes=()),
            graphdef=self._decode_static.graphdef,
            cache_length=length,
            suffix_length=count,
        )
        data = self._prompt_data(batch, sampling, seeds, limits)
        data = dataclasses.replace(data, params=self._decode_params)
        with use_mesh(self._mesh):
            return programs.append_prompt(static, data, caches, jnp.int32(first))

    def decode(self, state: DecodeState) -> Generation:
        """The other new tokens: the second half of `generate`. The state is consumed."""
        with use_mesh(self._mesh):
            done = programs.decode(self._decode_static, self._decode_params, state)
        return Generation(done.tokens, done.length, done.stats, done.logprobs)

    def insert(
        self, state: DecodeState | None, new: DecodeState, slots: Sequence[int], rows: int
    ) -> DecodeState:
        """The state with prompts in some of its slots; `state` is consumed.

        Args:
          state: Continuously batched rows; None stands for `rows` empty slots.
          new: As many rows as `slots`.
          slots: The row number that each of them gets; those from `rows` on are dropped.
          rows: The number of slots.
        """
        with use_mesh(self._mesh):
            state = programs.empty_slots(new, rows=rows) if state is None else state
            return programs.insert(state, new, jnp.asarray(slots))

    def grow(self, state: DecodeState, cache_length: int) -> DecodeState:
        """Continuously batched rows with longer caches."""
        with use_mesh(self._mesh):
            return programs.grow(state, cache_length=cache_length)

    def advance(
        self, state: DecodeState, steps: int, stop_after_done: int | None = None
    ) -> DecodeState:
        """Further tokens of continuously batched rows; `state` is consumed.

        Args:
          state: The rows, whose caches have room for these tokens.
          steps: The most new tokens of a row.
          stop_after_done: Stops as soon as this many rows are done; default: all rows.
        """
        enough = len(state.done) if stop_after_done is None else stop_after_done
        state = state.replace(steps_left=jnp.int32(steps), stop_after_done=jnp.int32(enough))
        with use_mesh(self._mesh):
            state = programs.decode(self._decode_static, self._decode_params, state)
        return state.replace(steps_left=None, stop_after_done=None)

    def score(
        self,
        batch: Batch,
        queries: Int[AnyArray, "B Q"],
        targets: Int[AnyArray, "B Q"],
        prefix: PrefixCache | None = None,
        prefix_index: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
        """Log-probability of every target token, and whether it is the most likely one.

        Args:
          batch: The whole rows.
          queries: Columns whose next token is scored; none of them may belong to the prefix.
          targets: That next token.
          prefix: What right-padded rows begin with; it is not read again.
          prefix_index: The prefix that each row begins with; default: the first.
        """
        found, suffix = _prefix_data(batch, prefix, prefix_index)
        static = programs.ScoreStatic(self._graphdef, suffix, logits_bytes=self.config.logits_bytes)
        data = programs.ScoreData(self._params, batch, queries, targets, found)
        with use_mesh(self._mesh):
            return programs.score(static, data)

    @property
    def parameters(self) -> tuple[nnx.State, nnx.State]:
        """The parameters of the prefill program and those of the decode program."""
        return self._params, self._decode_params

    def update(self, tuning: Tuning) -> bool:
        """Takes over the values of a tuning; nothing is compiled.

        Args:
          tuning: One that differs in values only from that of this engine's model: a steering
            vector, or adapters that have been loaded or unloaded.

        Returns:
          Whether it is such a tuning; if not, the engine stays as it was.
        """
        if nnx.graphdef(tuning) != self._tuning_graphdef:
            return False
        pairs, decoding = [], tuning.for_decoding()
        for params, own in zip(self.parameters, (tuning, decoding), strict=True):
            values = dict(nnx.to_flat_state(nnx.state(own)))
            for path, variable in nnx.to_flat_state(params):
                if path[0] == "tuning":
                    pairs.append((variable, values[path[1:]].get_value()))
        if any(variable.shape != value.shape for variable, value in pairs):
            return False
        self.changes += 1
        self._virtual = _host(tuning.virtual_table())
        for variable, value in pairs:
            variable.set_value(value)
        return True

    def lower_prefill(self, batch: Batch, max_new_tokens: int) -> jax.stages.Lowered:
        """The lowered prefill program of a batch of this shape, for inspection."""
        return programs.prefill.lower(*self._greedy(batch, max_new_tokens))

    def lower_decode(self, batch: Batch, max_new_tokens: int) -> jax.stages.Lowered:
        """The lowered decode program of a batch of this shape, for inspection."""
        state = programs.prefill.eval_shape(*self._greedy(batch, max_new_tokens))
        return self.lower_steps(state)

    def lower_steps(self, state: DecodeState) -> jax.stages.Lowered:
        """The lowered decode program of rows of these shapes and shardings."""
        return programs.decode.lower(self._decode_static, self._decode_params, state)

    def _greedy(
        self, batch: Batch, max_new_tokens: int
    ) -> tuple[programs.PrefillStatic, programs.PromptData]:
        """Arguments of the prefill program for greedy choice."""
        static = self._prefill_static(max_new_tokens, GREEDY, probes=self._probes)
        return static, self._prompt_data(batch, GREEDY, None, None)

    def _prefill_static(
        self,
        max_new_tokens: int,
        sampling: Sampling,
        logprobs: bool = False,
        probes: tuple[Probe, ...] = (),
    ) -> programs.PrefillStatic:
        """What is compiled into the prefill; a seed is not."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        sampling = dataclasses.replace(sampling, seed=0)
        config = dataclasses.replace(self._decode_config, sampling=sampling, logprobs=logprobs)
        return programs.PrefillStatic(
            self._graphdef,
            config=config,
            num_virtual_tokens=self.num_virtual_tokens,
            max_new_tokens=max_new_tokens,
            probes=probes,
        )

    def _prompt_data(
        self,
        batch: Batch,
        sampling: Sampling,
        seeds: Sequence[int] | None,
        limits: Sequence[int] | None,
        choice: RowChoice | None = None,
    ) -> programs.PromptData:
        """The prompts with seeds, if tokens may be drawn, and limits."""
        if seeds is None:
            seeds = [sampling.seed] * len(batch.tokens)
        return programs.PromptData(
            self._params,
            batch,
            jnp.asarray(seeds, jnp.uint32) if sampling.temperature or choice else None,
            None if limits is None else jnp.asarray(limits, jnp.int32),
            virtual=self._own_virtual(batch),
            choice=choice,
        )

    def _own_virtual(self, batch: Batch) -> Bool[np.ndarray, "B P"] | None:
        """Which virtual tokens each row has; None: all."""
        if self._virtual is None:
            return None
        chosen = -1 if batch.adapter is None else np.asarray(batch.adapter)
        return self._virtual[np.broadcast_to(chosen, len(batch.tokens))]


def _host(x: Array | None) -> np.ndarray | None:
    return None if x is None else np.asarray(x)


def _unstacked(model: MLLM) -> MLLM:
    """A copy of the model with its blocks one by one."""
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


def _prefix_data(
    batch: Batch, prefix: PrefixCache | None, prefix_index: Sequence[int] | None
) -> tuple[programs.PrefixData | None, int]:
    """The prefixes as programs take them, and the most tokens of a row that follow its prefix."""
    if prefix is None:
        return None, 0
    rows, length = batch.layout.shape
    index = np.zeros(rows, np.int32) if prefix_index is None else np.asarray(prefix_index, np.int32)
    data = programs.PrefixData(prefix.caches, jnp.int32(prefix.length), index)
    return data, length - rounded(prefix.length)
