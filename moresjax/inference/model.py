"""The public model: generate, score, attach.

    import moresjax as mj
    model = mj.load("runs/finetune")
    model.generate(["what is in the image?"], images=[["photo.jpg"]])

Axis legend: B rows, S tokens, V vocabulary, N images per row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.data.images import LazyPixels
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.generation.beam import Beams
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.generation.lengths import bucket, rounded
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
from moresjax.generation.shared_prefix import SharedPrefixes, find_shared_prefixes
from moresjax.generation.state import Generation, PrefixCache
from moresjax.generation.text import check_stops, cut_at_stop, has_stop
from moresjax.models.fused_attention import kernel_for
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.processor import name_words
from moresjax.sharding.mesh import shard_params, use_mesh
from moresjax.tuning.base import Probe
from moresjax.tuning.merge import merged
from moresjax.tuning.multi_adapter import adapter_ids
from moresjax.weights.adapter import attach_adapter, fingerprint, load_adapters


class Model:
    """A multimodal LLM with its processor.

    Generation holds the LLM's blocks one by one instead of stacked: in memory they are once.

    Args:
      mllm: the Flax module, which is the model's from now on.
      processor: tokenizer, template and image processor; None when the folder had no tokenizer.
      mesh: The mesh that the parameters are placed on.
      engine_config: The knobs of generation.
    """

    def __init__(
        self,
        mllm: MLLM,
        processor: Processor | None,
        mesh: Mesh | None = None,
        engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
    ):
        self.engine_config = engine_config
        self._mllm, self.processor, self._mesh = mllm, processor, mesh
        self._engines: dict[tuple, Engine] = {}
        self._name_words()

    def _name_words(self) -> None:
        if self.processor is not None:
            name_words(self._mllm.tuning, self.processor.tokenizer)

    @property
    def mllm(self) -> MLLM:
        """The Flax module with stacked blocks; ends the engines, which hold them one by one."""
        if isinstance(self._mllm.llm.blocks, nnx.List):
            self._engines.clear()
            self._mllm.llm.restack()
            if self._mesh is not None:
                self.shard(self._mesh)
        return self._mllm

    @property
    def config(self) -> MLLMConfig:
        return self._mllm.config

    @property
    def tuning(self) -> str:
        """Spec string of the attached tuning."""
        return self._mllm.tuning.spec

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell models apart; generation goes on after it."""
        return fingerprint(self._mllm)

    @property
    def max_length(self) -> int:
        """Tokens that a row has room for, new ones included."""
        return self.config.llm.max_positions - self._mllm.tuning.num_virtual_tokens

    def shard(self, mesh: Mesh) -> None:
        """Splits the parameters over the devices of a mesh, by the rules of training. From then on
        generation, scores and logits run on all of them, with rows split over `data` and `fsdp`.
        """
        nnx.update(self.mllm, shard_params(nnx.state(self.mllm), mesh))
        self._mesh = mesh

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        Raises:
          UserError: when the spec is malformed or does not fit the model.
        """
        self.mllm.attach(tuning, seed=seed)
        self._name_words()

    def load_adapter(self, folder: str | Path) -> None:
        """Replaces the attached tuning by an adapter folder, our own or one of `peft`.

        Raises:
          UserError: when the folder is neither, or does not belong to this model.
        """
        attach_adapter(self.mllm, folder)
        self._name_words()

    def load_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Replaces the attached tuning by several adapter folders, one of which `generate` and
        `logits` use for each prompt.

        Args:
          folders: by the names to choose them with; adapters of one spec, up to their layers.

        Raises:
          UserError: when a folder is not an adapter of this model, or they do not go together.
        """
        load_adapters(self.mllm, folders)
        self._name_words()

    def merge(self) -> "Model":
        """The same model with LoRA, IA3 and the like folded into the weights; edits stay attached.

        Raises:
          UserError: when a weight delta cannot be merged.
        """
        return Model(merged(self.mllm), self.processor, self._mesh, self.engine_config)

    def engine(self, probes: Sequence[Probe] = ()) -> Engine:
        """The generation engine with these probes; kept between calls."""
        key = tuple(probes)
        if key not in self._engines:
            tokenizer = self._need_processor().tokenizer
            pad = tokenizer.pad_token_id
            eos = self.processor.eos_ids
            self._mllm.llm.unstack()
            self._engines[key] = Engine(
                self._mllm,
                eos_ids=eos,
                pad_id=eos[0] if pad is None else pad,
                probes=probes,
                mesh=self._mesh,
                config=self.engine_config,
            )
        return self._engines[key]

    def prompt(
        self,
        text: str,
        images: Sequence = (),
        name: str = "prompt",
        known: dict[tuple, LazyPixels] | None = None,
    ) -> Row:
        """The unpadded row of a one-turn prompt. Images without an `<image>` mark go first.

        Args:
          text: what the user says.
          images: of the prompt.
          name: for error messages.
          known: as in `Processor.row`: images of earlier prompts. Those that several prompts are
            about are read by the model once.

        Raises:
          UserError: when marks and images do not agree, or an image is missing or broken.
        """
        if not text.strip() and not images:
            raise UserError("the prompt is empty")
        sample = Sample(name, (Turn(_marked(text, images)),), tuple(images))
        return self._need_processor().row(sample, known)

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence] | None = None,
        *,
        max_new_tokens: int = 128,
        adapters: Sequence[str | None] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> list[str]:
        """Answers to prompts.

        Args:
          prompts: user texts; `<image>` marks where an image goes.
          images: for every prompt its images (paths, PIL images or uint8 arrays).
          max_new_tokens: at most this many tokens each.
          adapters: for every prompt the name of a loaded adapter, or None for the base model.
          sampling: how tokens are chosen; greedy by default.
          seeds: for every prompt that of its draws; default: `sampling.seed`.
          stop: an answer ends before the first of these strings.
          batch_size: prompts that are answered at a time; default: all.
          num_beams, length_penalty, early_stopping: of a beam search (see `Beams`), which goes with
            greedy choice and one batch only.

        Raises:
          UserError: for an empty prompt, an unreadable image, marks without images, an unknown
            adapter, a prompt that is too long, or options that do not go together.
        """
        beams = Beams(num_beams, length_penalty, early_stopping)
        beams.check(sampling, stop=stop, batch_size=batch_size)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(images)} lists of images")
        known = {}
        rows = [
            self.prompt(p, i, f"prompt {n}", known)
            for n, (p, i) in enumerate(zip(prompts, images, strict=True))
        ]
        options = {"adapters": adapters, "sampling": sampling, "seeds": seeds}
        if not stop and batch_size is None:
            done = self.generate_rows(rows, max_new_tokens, beams=beams, **options)
            return self.decode(done)
        size = max(len(rows), 1) if batch_size is None else batch_size
        options |= {"stop": stop, "batch_size": size}
        done = self.generate_many(rows, max_new_tokens, **options)
        return [self.text(completion.tokens, stop) for completion in done]

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
        """Continues prompt rows as one batch, padded to a bucket length.

        Raises:
          UserError: for a row that leaves no room for the new tokens, or a beam search with
            sampling, log-probabilities or probes.
        """
        for row in rows:
            self.check_context(row, max_new_tokens)
        _check_seeds(seeds, rows)
        batch = self.batch(rows, bucket(max(map(len, rows))), adapters)
        options = {"sampling": sampling, "seeds": seeds, "logprobs": logprobs, "beams": beams}
        return self.engine(probes).generate(batch, max_new_tokens, **options)

    def generate_many(
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
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Continues any number of prompt rows, `batch_size` at a time, and refills the batch.

        Args:
          rows: the prompts.
          max_new_tokens: of all prompts, or of each.
          batch_size, probes, logprobs: of the batch that is decoded.
          adapters, sampling, seeds: as in `generate`.
          stop: a row ends soon after one of these strings; the tokens are not cut there.
          on_done: called with number and completion of every prompt as soon as it has ended.

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
        size = -(-batch_size // self.engine_config.prefills_per_batch)
        results: list[Completion | None] = [None] * len(rows)
        for number, completion in generate_continuously(
            self.engine(probes),
            self._queue(rows, size, adapters, shared, probes),
            limits,
            batch_size=batch_size,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
            ended=(lambda ids: has_stop(self.spell(ids), stops)) if stops else None,
        ):
            results[number] = completion
            if on_done is not None:
                on_done(number, completion)
        return results

    def _shared_prefixes(
        self, rows: Sequence[Row], adapters: Sequence[str | None] | None
    ) -> SharedPrefixes:
        """What prompts have in common, where reading it once pays."""
        text = kernel_for(self.config.llm) == "xla"  # kernels read whole prompts only
        return find_shared_prefixes(rows, self._mllm.tuning, adapters, text, self.engine_config)

    def _reader(
        self,
        shared: SharedPrefixes,
        adapters: Sequence[str | None] | None,
        probes: Sequence[Probe],
    ) -> Callable[[Sequence[int]], PrefixCache]:
        """What reads beginnings of some numbers; text that they have in common is read once."""
        engine, names = self.engine(probes), shared.adapters(adapters)
        common = self._shared_prefixes(shared.rows, names)
        begin = None
        if common.rows:
            begin = self._reader(common, names, probes)([0] * engine.num_shards)
        before = 0 if begin is None else begin.length

        def read(numbers):
            heads = [shared.rows[n] for n in numbers]
            length = rounded(len(heads[0]) - before) + rounded(before)
            batch = self.batch(heads, length, names and [names[n] for n in numbers])
            return engine.read_prefix(batch, begin)

        return read

    def _queue(
        self,
        rows: Sequence[Row],
        size: int,
        adapters: Sequence[str | None] | None,
        shared: SharedPrefixes,
        probes: Sequence[Probe] = (),
    ) -> PrefillScheduler:
        """Prompts in groups of one size, with the reader of what they have in common."""
        options = {"adapters": adapters, "shared": shared}
        if shared.rows:
            options["read_prefixes"] = self._reader(shared, adapters, probes)
            options["num_shards"] = self.engine(probes).num_shards
        return PrefillScheduler(rows, self.batch, size, **options)

    def check_context(self, row: Row, max_new_tokens: int) -> None:
        """Raises a `UserError` when a prompt and its continuation do not fit the model."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._check_room(row, max_new_tokens, f"max_new_tokens={max_new_tokens}")

    def check_answer(self, row: Row, answer: Ids) -> None:
        """Raises a `UserError` when an answer to score is empty or does not fit with its prompt."""
        if not len(answer):
            raise UserError("an answer to score has no tokens")
        # The last token is not read.
        self._check_room(row, len(answer) - 1, f"an answer of {len(answer)} tokens")

    def _check_room(self, row: Row, more: int, what: str) -> None:
        tokens = len(row)
        if tokens + more > self.max_length:
            ahead = self._mllm.tuning.num_virtual_tokens
            raise UserError(
                f"a prompt of {tokens + ahead} tokens and {what} do not fit the model's "
                f"{self.max_length + ahead} positions"
            )

    def batch(
        self,
        rows: Sequence[Row],
        length: int,
        adapters: Sequence[str | None] | None = None,
    ) -> Batch:
        """Prompt rows as one batch, padded to `length` tokens."""
        processor = self._need_processor()
        images = max(row.num_images for row in rows)
        padded = {}  # by row: fillers are others again
        for row in rows:
            if id(row) not in padded:
                padded[id(row)] = processor.pad(row, length, images)
        batch = processor.batch([padded[id(row)] for row in rows])
        return self._choose(batch, adapters)

    def decode(self, generation: Generation) -> list[str]:
        """Texts of a generation, special tokens left out."""
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.length)
        return [self.text(row[:n]) for row, n in zip(tokens, lengths, strict=True)]

    def text(self, ids: Ids, stop: str | Sequence[str] = ()) -> str:
        """New tokens as text, before the first stop string; special tokens left out."""
        return cut_at_stop(self.spell(ids), check_stops(stop)).strip()

    def spell(self, ids: Ids) -> str:
        """New tokens as text, special tokens left out."""
        return self._need_processor().tokenizer.decode(ids, skip_special_tokens=True)

    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        images: Sequence[Sequence] | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        batch_size: int = 8,
    ) -> list[list[ContinuationScore]]:
        """Log-likelihoods of given answers; a prompt and its images are read once for all of them.

        Prompt and answer are tokenised together, as the template writes them; the token that ends
        an answer is not scored.

        Args:
          prompts, images, adapters: as in `generate`.
          continuations: for every prompt its answers.
          batch_size: prompts that are read at a time.

        Raises:
          UserError: as `generate`, and for an empty answer.
        """
        images = [()] * len(prompts) if images is None else images
        adapter_ids(self._mllm.tuning, adapters, len(prompts))  # raises before images are read
        pairs, names, known = [], [], {}
        for n, (prompt, answers, own) in enumerate(
            zip(prompts, continuations, images, strict=True)
        ):
            row = self.prompt(prompt, own, f"prompt {n}", known)
            pairs += [self.with_answer(row, prompt, own, answer) for answer in answers]
            names += [None if adapters is None else adapters[n]] * len(answers)
        flat = iter(self.score_rows(pairs, batch_size, adapters and names))
        return [[next(flat) for _ in answers] for answers in continuations]

    def with_answer(
        self, row: Row, text: str, images: Sequence, answer: str
    ) -> tuple[Row, np.ndarray]:
        """What `score_rows` takes for an answer to the prompt that `row` was made of.

        Raises:
          UserError: for an empty answer.
        """
        if not answer.strip():
            raise UserError(f"an answer to score is empty: {text!r}")
        sample = Sample("answer", (Turn(_marked(text, images), answer),), tuple(images))
        whole = self._need_processor().without_end.text_row(sample)
        head = int(np.argmax(whole.kind == TokenKind.ANSWER))
        return whole[:head].replace(pixels=row.pixels), whole.tokens[head:]

    def score_rows(
        self,
        pairs: Sequence[tuple[Row, Ids]],
        batch_size: int = 8,
        adapters: Sequence[str | None] | None = None,
    ) -> list[ContinuationScore]:
        """Scores of continuations, given as prompt row and token ids, each with its adapter; equal
        prompts to one adapter share a row.

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
        queue = self._queue([b.row for b in whole], batch_size, names, shared)
        if shared.rows:
            score = self.engine().score
        else:  # stacked blocks compile faster
            graphdef, params = nnx.split(self._mllm)
            static = ScoreStatic(graphdef, logits_chunk=self.engine_config.logits_chunk)

            def score(batch, queries, targets, *nothing):
                return score_program(static, ScoreData(params, batch, queries, targets))

        results: list[ContinuationScore | None] = [None] * len(pairs)
        with use_mesh(self._mesh):
            found = score_continuations(whole, queue, score)
        for own, scores in zip(groups, found, strict=True):
            for number, one in zip(own, scores, strict=True):
                results[number] = one
        return results

    def logits(
        self,
        prompts: Sequence[str] | None = None,
        images: Sequence[Sequence] | None = None,
        *,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        image_token_id: int | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Float[Array, "B S V"]:
        """Next-token logits in fp32.

        Takes either prompts and images, or tokens with the conventions of `transformers`.

        Args:
          prompts, images: as in `generate`.
          input_ids: `[B, S]` with one `image_token_id` per visual token.
          attention_mask: `[B, S]`, 0 for padding on either side; default all ones.
          pixel_values: `[images, 3, height, width]`, the images of all rows in order.
          image_token_id: the id that stands for a visual token.
          adapters: as in `generate`.
        """
        if prompts is not None:
            images = [()] * len(prompts) if images is None else images
            rows = [self.prompt(p, i) for p, i in zip(prompts, images, strict=True)]
            batch = self.batch(rows, max(map(len, rows)), adapters)
        else:
            batch = hf_batch(
                input_ids, attention_mask, pixel_values, image_token_id, self.config.visual_tokens
            )
            batch = self._choose(batch, adapters)
        graphdef, state = nnx.split(self._mllm)
        with use_mesh(self._mesh):
            return _logits(graphdef, state, batch)

    def _choose(self, batch: Batch, adapters: Sequence[str | None] | None) -> Batch:
        numbers = adapter_ids(self._mllm.tuning, adapters, len(batch.tokens))
        return dataclasses.replace(batch, adapter=numbers)

    def _need_processor(self) -> Processor:
        if self.processor is None:
            raise UserError("this model was loaded without a tokenizer; text cannot be used")
        return self.processor


def _marked(text: str, images: Sequence) -> str:
    """The text with a mark for every image: at its start, unless it has marks."""
    return text if IMAGE_MARK in text else (IMAGE_MARK + "\n") * len(images) + text


def _check_seeds(seeds: Sequence[int] | None, rows: Sequence[Row]) -> None:
    if seeds is not None and len(seeds) != len(rows):
        raise UserError(f"{len(rows)} prompts but {len(seeds)} seeds")


def _forward(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    return model.llm.logits(model(batch).hidden)


_logits = jax.jit(_forward, static_argnums=0)
