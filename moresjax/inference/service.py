"""Generation and scores for rows of tokens: engines, the schedule of prompts and shared prefixes.

Axis legend: B rows, S tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Required, TypedDict, Unpack

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.generation.beam import Beams
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.engine import Engine
from moresjax.generation.lengths import bucket, rounded, rounded_rows
from moresjax.generation.programs import ScoreData, ScoreStatic
from moresjax.generation.programs import score as score_program
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.scheduler import Completion, PrefillScheduler, generate_continuously
from moresjax.generation.scoring import (
    ContinuationScore,
    group_by_prompt,
    score_continuations,
    with_branches,
)
from moresjax.generation.shared_prefix import SharedPrefixes, find_shared_prefixes, shared_text
from moresjax.generation.state import Generation, PrefixCache
from moresjax.generation.text import check_stops, has_stop
from moresjax.inference.prompts import PromptEncoder
from moresjax.models.fused_attention import kernel_for
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import batch_shards, use_mesh
from moresjax.tuning.multi_adapter import adapter_ids
from moresjax.tuning.probes import Probe, reads_images


class StreamOptions(TypedDict, total=False):
    """Keyword arguments of `GenerationService.stream`, which documents them."""

    batch_size: Required[int]
    probes: Sequence[Probe]
    adapters: Sequence[str | None] | None
    sampling: Sampling
    seeds: Sequence[int] | None
    logprobs: bool
    stop: str | Sequence[str]


class GenerationService:
    """Continues and scores rows of tokens with one model.

    Engines are compiled when they are first needed and kept, one for every set of probes. The first
    of them turns the LLM's stacked blocks into a list, as decoding needs them; the service then
    uses the list for everything, so that the LLM is in memory once.

    Args:
      mllm: the model, which the service shares with its owner. Whoever changes it calls `reset`.
      prompts: pads rows to batches and knows the tokens that end an answer.
      mesh: the devices that the parameters are on; None for a single device.
      config: the knobs of the engines.
    """

    def __init__(
        self,
        mllm: MLLM,
        prompts: PromptEncoder,
        mesh: Mesh | None = None,
        config: EngineConfig = DEFAULT_ENGINE_CONFIG,
    ) -> None:
        self._mllm, self._prompts, self.mesh, self.config = mllm, prompts, mesh, config
        self._engines: dict[tuple[Probe, ...], Engine] = {}

    @property
    def max_length(self) -> int:
        """How many tokens a row may have, new ones included."""
        return self._mllm.config.llm.max_positions - self._mllm.tuning.num_virtual_tokens

    @property
    def _num_shards(self) -> int:
        """How many parts of a batch lie on different devices."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def engine(self, probes: Sequence[Probe] = ()) -> Engine:
        """The engine that reads these probes; kept until `reset`."""
        key = tuple(probes)
        if key not in self._engines:
            eos, pad = self._prompts.processor.eos_ids, self._prompts.tokenizer.pad_token_id
            self._mllm.llm.unstack()
            self._engines[key] = Engine(
                self._mllm,
                eos_ids=eos,
                pad_id=next(iter(eos), 0) if pad is None else pad,
                probes=key,
                mesh=self.mesh,
                config=self.config,
            )
        return self._engines[key]

    def reset(self) -> None:
        """Drops all engines; the next call makes one of the model as it is then."""
        self._engines.clear()

    def update(self) -> bool:
        """Gives all engines the values of the tuning; those of another tuning are dropped.

        Returns:
          Whether all have them.
        """
        kept = {key: own for key, own in self._engines.items() if own.update(self._mllm.tuning)}
        same = len(kept) == len(self._engines)
        self._engines = kept
        return same

    def batch(
        self, rows: Sequence[Row], length: int, adapters: Sequence[str | None] | None = None
    ) -> Batch:
        """Rows as one batch, right-padded to `length` tokens.

        Raises:
          UserError: for an unknown adapter, or another number of adapters than rows.
        """
        return self.choose_adapters(self._prompts.batch(rows, length), adapters)

    def choose_adapters(self, batch: Batch, adapters: Sequence[str | None] | None) -> Batch:
        """The batch with the number of each row's adapter.

        Raises:
          UserError: for an unknown adapter, or another number of adapters than rows.
        """
        numbers = adapter_ids(self._mllm.tuning, adapters, len(batch.tokens))
        return dataclasses.replace(batch, adapter=numbers)

    def logits(self, batch: Batch) -> Float[Array, "B S V"]:
        """Next-token logits of every token, in fp32."""
        graphdef, state = nnx.split(self._mllm)
        with use_mesh(self.mesh):
            return _logits(graphdef, state, batch)

    def generate_rows(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        probes: Sequence[Probe] = (),
        adapters: Sequence[str | None] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        beams: Beams | None = None,
    ) -> Generation:
        """Continues rows as one batch, padded to a bucket length.

        Args:
          rows: the prompts, unpadded.
          max_new_tokens: each row gets at most this many new tokens.
          probes: statistics to read on the way.
          adapters: for every row the name of a loaded adapter, or None for the base model.
          sampling: how tokens are chosen.
          seeds: the seed of every row's draws; default: `sampling.seed` for all.
          logprobs: whether to return the log-probabilities of the new tokens.
          beams: settings of a beam search, which replaces the choice token by token.

        Raises:
          UserError: for a row that leaves no room for the new tokens, or a beam search with
            sampling, log-probabilities or probes.
        """
        for row in rows:
            self.check_context(row, max_new_tokens)
        _check_seeds(seeds, rows)
        batch = self.batch(rows, bucket(max(map(len, rows))), adapters)
        sampling = self._as_the_folder_says(sampling)
        options = {"sampling": sampling, "seeds": seeds, "logprobs": logprobs, "beams": beams}
        return self.engine(probes).generate(batch, max_new_tokens, **options)

    def generate_many(
        self,
        rows: Sequence[Row],
        max_new_tokens: int | Sequence[int],
        *,
        on_done: Callable[[int, Completion], None] | None = None,
        **options: Unpack[StreamOptions],
    ) -> list[Completion]:
        """Continues any number of rows, `batch_size` at a time, and refills the batch.

        Args:
          rows: the prompts, unpadded.
          max_new_tokens: one limit for all rows, or a limit for each.
          on_done: called with number and completion of every row as soon as it has ended.
          options: those of `stream`.

        Raises:
          UserError: for a row that leaves no room for the new tokens, or a batch size below 1.
        """
        results: dict[int, Completion] = {}
        for number, completion in self.stream(rows, max_new_tokens, **options):
            results[number] = completion
            if on_done is not None:
                on_done(number, completion)
        return [results[number] for number in range(len(rows))]

    def stream(
        self,
        rows: Sequence[Row],
        max_new_tokens: int | Sequence[int],
        *,
        batch_size: int,
        probes: Sequence[Probe] = (),
        adapters: Sequence[str | None] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        stop: str | Sequence[str] = (),
    ) -> Iterator[tuple[int, Completion]]:
        """Number and completion of every row, as soon as it has ended; none is kept.

        Args:
          rows: the prompts, unpadded.
          max_new_tokens: one limit for all rows, or a limit for each.
          batch_size: how many rows are decoded at a time; fewer rows make a smaller batch.
          probes: statistics to read on the way.
          adapters: for every row the name of a loaded adapter, or None for the base model.
          sampling: how tokens are chosen.
          seeds: the seed of every row's draws; default: `sampling.seed` for all.
          logprobs: whether to return the log-probabilities of the new tokens.
          stop: a row ends soon after one of these strings; its tokens are not cut there.

        Raises:
          UserError: for a row that leaves no room for the new tokens, or a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        limits = (
            [max_new_tokens] * len(rows)
            if isinstance(max_new_tokens, int)
            else list(max_new_tokens)
        )
        for row, limit in zip(rows, limits, strict=True):
            self.check_context(row, limit)
        _check_seeds(seeds, rows)
        stops = check_stops(stop)
        shared = self._shared_prefixes(rows, adapters)
        if any(map(reads_images, probes)):  # which are read with each prompt then
            shared = SharedPrefixes([-1] * len(rows))
        spell, size = self._prompts.spell, -(-batch_size // self.config.prefills_per_batch)
        return generate_continuously(
            self.engine(probes),
            self._scheduler(rows, size, adapters, shared, probes),
            limits,
            batch_size=rounded_rows(len(rows), batch_size, self._num_shards),
            sampling=self._as_the_folder_says(sampling),
            seeds=seeds,
            logprobs=logprobs,
            ended=(lambda ids: has_stop(spell(ids), stops)) if stops else None,
        )

    def complete(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        *,
        batch_size: int | None = None,
        adapters: Sequence[str | None] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        stop: str | Sequence[str] = (),
        beams: Beams | None = None,
    ) -> list[Completion]:
        """Continues rows as one batch, or by `generate_many` where a batch size or stop is given.

        The arguments are those of `generate_rows` and `generate_many`; no rows have no completions.
        """
        if not rows:
            return []
        options = {"adapters": adapters, "sampling": sampling, "seeds": seeds}
        options["logprobs"] = logprobs
        if stop or batch_size is not None:
            size = len(rows) if batch_size is None else batch_size
            return self.generate_many(rows, max_new_tokens, batch_size=size, stop=stop, **options)
        done = self.generate_rows(rows, max_new_tokens, beams=beams, **options)
        tokens, length = np.asarray(done.tokens), np.asarray(done.length)
        chosen = None if done.logprobs is None else np.asarray(done.logprobs)
        return [
            Completion(tokens[row, :count], None if chosen is None else chosen[row, :count], {})
            for row, count in enumerate(length)
        ]

    def _as_the_folder_says(self, sampling: Sampling) -> Sampling:
        """The settings with the model's own penalty where the caller has none."""
        if sampling.repetition_penalty is not None:
            return sampling
        penalty = self._prompts.processor.generation.repetition_penalty
        return dataclasses.replace(sampling, repetition_penalty=penalty)

    def score_rows(
        self,
        pairs: Sequence[tuple[Row, Ids]],
        batch_size: int = 8,
        adapters: Sequence[str | None] | None = None,
    ) -> list[ContinuationScore]:
        """Log-likelihoods of continuations; equal prompts to one adapter share a row.

        Args:
          pairs: prompt row and token ids of every continuation.
          batch_size: how many prompts are read at a time.
          adapters: for every pair the name of a loaded adapter, or None for the base model.

        Raises:
          UserError: for a pair that does not fit the model.
        """
        for pair in pairs:
            self.check_answer(*pair)
        groups = group_by_prompt(pairs, adapters)
        prompts = [pairs[own[0]][0] for own in groups]
        names = None if adapters is None else [adapters[own[0]] for own in groups]
        shared = self._shared_prefixes(prompts, names)
        whole = [
            with_branches(prompt, [pairs[i][1] for i in own])
            for prompt, own in zip(prompts, groups, strict=True)
        ]
        scheduler = self._scheduler([b.row for b in whole], batch_size, names, shared)
        # A model that has not generated yet has stacked blocks, which compile faster.
        score = self.engine().score if shared.rows else self._score_whole()
        results: dict[int, ContinuationScore] = {}
        with use_mesh(self.mesh):
            found = score_continuations(whole, scheduler, score)
        for own, scores in zip(groups, found, strict=True):
            results |= dict(zip(own, scores, strict=True))
        return [results[number] for number in range(len(pairs))]

    def _score_whole(self) -> Callable[..., tuple]:
        """Scores prompts that are read as a whole, as `Engine.score` does, without an engine."""
        graphdef, params = nnx.split(self._mllm)
        static = ScoreStatic(graphdef, logits_bytes=self.config.logits_bytes)

        def score(batch: Batch, queries: np.ndarray, targets: np.ndarray, *_: object) -> tuple:
            return score_program(static, ScoreData(params, batch, queries, targets))

        return score

    def check_context(self, row: Row, max_new_tokens: int) -> None:
        """Raises a `UserError` when a prompt and its continuation do not fit the model."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._check_room(row, max_new_tokens, f"max_new_tokens={max_new_tokens}")

    def check_answer(self, row: Row, answer: Ids) -> None:
        """Raises a `UserError` when an answer to score is empty or does not fit with its prompt."""
        if not len(answer):
            raise UserError("an answer to score has no tokens")
        self.check_ids(answer)
        # The last token is not read.
        self._check_room(row, len(answer) - 1, f"an answer of {len(answer)} tokens")

    def check_ids(self, ids: Ids) -> None:
        """Raises a `UserError` for a token id that has no embedding."""
        vocab, largest = self._mllm.config.llm.vocab_size, np.max(ids, initial=0)
        if largest >= vocab:
            raise UserError(f"token id {largest} is none of the model's {vocab} embeddings")

    def _check_room(self, row: Row, more: int, what: str) -> None:
        self.check_ids(row.tokens)
        tokens = len(row)
        if tokens + more > self.max_length:
            ahead = self._mllm.tuning.num_virtual_tokens
            raise UserError(
                f"a prompt of {tokens + ahead} tokens and {what} do not fit the model's "
                f"{self.max_length + ahead} positions"
            )

    def _shared_prefixes(
        self, rows: Sequence[Row], adapters: Sequence[str | None] | None
    ) -> SharedPrefixes:
        """What rows begin with alike, where reading it once pays."""
        text = self._shares_text
        return find_shared_prefixes(rows, self._mllm.tuning, adapters, text, self.config)

    @property
    def _shares_text(self) -> bool:
        """Whether text that prompts begin with is read by itself; kernels read whole prompts."""
        return kernel_for(self._mllm.config.llm) in ("xla", "chunked")

    def _reader(
        self,
        shared: SharedPrefixes,
        adapters: Sequence[str | None] | None,
        probes: Sequence[Probe],
    ) -> Callable[[Sequence[int]], PrefixCache]:
        """A function that reads shared prefixes, given their numbers.

        Text that all of them begin with is read once.
        """
        engine, names = self.engine(probes), shared.adapters(adapters)
        common, begin = SharedPrefixes([]), None
        if self._shares_text:
            common = shared_text(shared.rows, self._mllm.tuning, names, self.config)
        if common.rows:
            begin = self._reader(common, names, probes)([0] * engine.num_shards)
        before = 0 if begin is None else begin.length

        def read(numbers: Sequence[int]) -> PrefixCache:
            heads = [shared.rows[n] for n in numbers]
            length = rounded(len(heads[0]) - before) + rounded(before)
            batch = self.batch(heads, length, names and [names[n] for n in numbers])
            return engine.read_prefix(batch, begin)

        return read

    def _scheduler(
        self,
        rows: Sequence[Row],
        size: int,
        adapters: Sequence[str | None] | None,
        shared: SharedPrefixes,
        probes: Sequence[Probe] = (),
    ) -> PrefillScheduler:
        """Rows in batches, with the reader of their shared prefixes."""
        options = {"adapters": adapters, "shared": shared, "num_shards": self._num_shards}
        if shared.rows:
            options["read_prefixes"] = self._reader(shared, adapters, probes)
        return PrefillScheduler(rows, self.batch, size, **options)


def _check_seeds(seeds: Sequence[int] | None, rows: Sequence[Row]) -> None:
    if seeds is not None and len(seeds) != len(rows):
        raise UserError(f"{len(rows)} prompts but {len(seeds)} seeds")


def _forward(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B S V"]:
    model = nnx.merge(graphdef, state)
    return model.llm.logits(model(batch).hidden)


_logits = jax.jit(_forward, static_argnums=0)
