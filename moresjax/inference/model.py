"""The public model: generate, score, logits, attach.

    import moresjax as mj
    model = mj.load("runs/finetune")
    model.generate("what is in the image?", "photo.jpg")

Axis legend: B rows, S tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, overload

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from typing_extensions import Unpack

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.data.processor import Processor
from moresjax.generation.beam import Beams
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.hf_inputs import hf_batch
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.scoring import ContinuationScore
from moresjax.inference.prompts import Answer, PromptEncoder, pair_images
from moresjax.inference.service import GenerationService
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.processor import name_words
from moresjax.sharding.mesh import shard_params
from moresjax.tuning.merge import merged
from moresjax.tuning.multi_adapter import adapter_ids
from moresjax.weights.adapter import attach_adapter, load_adapters
from moresjax.weights.fingerprint import fingerprint

Adapters = str | Sequence[str | None] | None


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate`, which documents them."""

    max_new_tokens: int
    adapters: Adapters
    sampling: Sampling
    seeds: Sequence[int] | None
    stop: str | Sequence[str]
    batch_size: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    logprobs: bool


class Model:
    """A multimodal LLM with its processor.

    Args:
      mllm: the Flax module, which belongs to this object from now on.
      processor: tokenizer, template and image processor; None when the folder had no tokenizer.
      mesh: the devices that the parameters are on; None for a single device.
      engine_config: the knobs of generation.

    Attributes:
      prompts: turns texts and images into rows of tokens, and tokens into texts.
      service: generates and scores for rows of tokens.
    """

    def __init__(
        self,
        mllm: MLLM,
        processor: Processor | None,
        mesh: Mesh | None = None,
        engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
    ) -> None:
        self._mllm = mllm
        self.prompts = PromptEncoder(processor)
        self.service = GenerationService(mllm, self.prompts, mesh, engine_config)
        self._name_words()

    def _name_words(self) -> None:
        if self.processor is not None:
            name_words(self._mllm.tuning, self.processor.tokenizer)

    @property
    def mllm(self) -> MLLM:
        """The Flax module. Its LLM's blocks are stacked until something is generated and a list
        afterwards, which is what decoding needs; see `restack`."""
        return self._mllm

    @property
    def processor(self) -> Processor | None:
        """Tokenizer, template and image processor; None when the folder had no tokenizer."""
        return self.prompts.saved_processor

    @property
    def config(self) -> MLLMConfig:
        """The architecture."""
        return self._mllm.config

    @property
    def tuning(self) -> str:
        """The spec string of the attached tuning."""
        return self._mllm.tuning.spec

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that `load_adapters` has loaded."""
        return self._mllm.tuning.adapters

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the parameters are on; None for a single device."""
        return self.service.mesh

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell models with different weights apart."""
        return fingerprint(self._mllm)

    def restack(self) -> MLLM:
        """Ends generation and returns the Flax module with stacked blocks, as training has them.

        The compiled engines are dropped; the next `generate` makes new ones.
        """
        self.service.reset()
        self._mllm.llm.restack()
        if self.mesh is not None:
            nnx.update(self._mllm, shard_params(nnx.state(self._mllm), self.mesh))
        return self._mllm

    def shard(self, mesh: Mesh) -> None:
        """Splits the parameters over the devices of a mesh, by the rules of training.

        Generation, scores and logits then run on all of these devices, with rows split over the
        mesh axes `data` and `fsdp`.
        """
        self.service.mesh = mesh
        self.restack()

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        Raises:
          UserError: when the spec is malformed or does not fit the model.
        """
        self._mllm.attach(tuning, seed=seed)
        self.service.reset()
        self._name_words()

    def load_adapter(
        self, folder: str | Path, *, edits: str = "", allow_pickle: bool = False
    ) -> None:
        """Replaces the attached tuning by an adapter folder of moresjax, `peft` or `pyreft`.

        Args:
          folder: The adapter folder.
          edits: What a folder of pyreft does not say: its methods and their tokens, such as
            `mores:positions=image`; see `moresjax.weights.pyreft.import_pyreft`.
          allow_pickle: Whether the pickles of a pyreft folder may be read.

        Raises:
          UserError: when the folder is none of these, or does not belong to this model.
        """
        attach_adapter(self.restack(), folder, edits=edits, allow_pickle=allow_pickle)
        self._name_words()

    def load_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Replaces the attached tuning by several adapter folders, of which `generate`, `score` and
        `logits` use one for each prompt.

        Args:
          folders: adapter folders by the names to choose them with. All have one spec, up to the
            layers that they act on.

        Raises:
          UserError: when a folder is not an adapter of this model, or they do not go together.
        """
        load_adapters(self.restack(), folders)
        self._name_words()

    def merge(self) -> "Model":
        """The same model with LoRA, IA3 and the like folded into the weights; edits stay attached.

        Raises:
          UserError: when a weight delta cannot be merged.
        """
        return Model(merged(self.restack()), self.processor, self.mesh, self.service.config)

    def prompt(self, text: str, images: object = (), name: str = "prompt") -> Row:
        """The row of tokens that a prompt becomes, for `service`.

        Args:
          text: what the user says.
          images: one image or a list of images; without an `<image>` mark they go first.
          name: what error messages call the prompt.

        Raises:
          UserError: when marks and images do not agree, or an image is missing or broken.
        """
        return self.prompts.row(text, images, name)

    @overload
    def generate(
        self,
        prompts: str,
        images: object = None,
        *,
        details: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: str,
        images: object = None,
        *,
        details: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        images: object = None,
        *,
        details: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        images: object = None,
        *,
        details: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        images: object = None,
        *,
        max_new_tokens: int = 128,
        adapters: Adapters = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        details: bool = False,
        logprobs: bool = False,
    ) -> str | list[str] | Answer | list[Answer]:
        """Answers to prompts.

        Args:
          prompts: what the user says, one text or a list of texts; `<image>` marks where an image
            goes, without marks images go first.
          images: for one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each. An image is a path, a PIL image or a uint8
            array `[Y, X, 3]`.
          max_new_tokens: an answer has at most this many tokens.
          adapters: the name of the loaded adapter that answers, or for every prompt its name or
            None for the base model.
          sampling: how tokens are chosen; greedy by default.
          seeds: the seed of every prompt's draws; default: `sampling.seed` for all.
          stop: an answer ends before the first of these strings.
          batch_size: how many prompts are answered at a time; default: all.
          num_beams: how many hypotheses a beam search follows; 1 for no search. A beam search goes
            with greedy choice and a single batch only.
          length_penalty: see `Beams`.
          early_stopping: see `Beams`.
          details: whether to return `Answer`s, with tokens and stop reason, instead of texts.
          logprobs: whether these answers have the log-probabilities of their tokens.

        Returns:
          One answer for one text, a list of answers for a list of texts.

        Raises:
          UserError: for an empty prompt, an unreadable image, images that cannot be assigned to
            prompts, an unknown adapter, a prompt that is too long, or options that do not go
            together.
        """
        if logprobs and not details:
            raise UserError("logprobs=True needs details=True: a text has no log-probabilities")
        beams = Beams(num_beams, length_penalty, early_stopping)
        beams.check(sampling, stop=stop, batch_size=batch_size, logprobs=logprobs)
        texts, own = pair_images(prompts, images)
        names = self._adapter_names(adapters, len(texts))
        rows = self.prompts.rows(texts, own)
        done = self.service.complete(
            rows,
            max_new_tokens,
            batch_size=batch_size,
            adapters=names,
            sampling=sampling,
            seeds=seeds,
            stop=stop,
            logprobs=logprobs,
            beams=beams,
        )
        if details:
            answers = [self.prompts.answer(one.tokens, one.logprobs, stop) for one in done]
        else:
            answers = [self.prompts.text(one.tokens, stop) for one in done]
        return answers[0] if isinstance(prompts, str) else answers

    @overload
    def score(
        self,
        prompts: str,
        continuations: Sequence[str],
        images: object = None,
        *,
        adapters: Adapters = None,
        batch_size: int = 8,
    ) -> list[ContinuationScore]: ...
    @overload
    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        images: object = None,
        *,
        adapters: Adapters = None,
        batch_size: int = 8,
    ) -> list[list[ContinuationScore]]: ...
    def score(
        self,
        prompts: str | Sequence[str],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        images: object = None,
        *,
        adapters: Adapters = None,
        batch_size: int = 8,
    ) -> list[ContinuationScore] | list[list[ContinuationScore]]:
        """Log-likelihoods of given answers; a prompt and its images are read once for all of them.

        Prompt and answer are tokenised together, as the template writes them; the token that ends
        an answer is not scored.

        Args:
          prompts: what the user says, one text or a list of texts.
          continuations: for one text its answers, for a list of texts a list of answers for each.
          images: for one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each.
          adapters: the name of the loaded adapter that scores, or for every prompt its name or None
            for the base model.
          batch_size: how many prompts are read at a time.

        Returns:
          The scores of one text's answers, or a list of these for a list of texts.

        Raises:
          UserError: as `generate`, and for an empty answer or answers that do not belong to one
            prompt each.
        """
        texts, own = pair_images(prompts, images)
        lists = _check_continuations(prompts, continuations, len(texts))
        names = self._adapter_names(adapters, len(texts))
        rows = self.prompts.rows(texts, own)
        pairs = [
            self.prompts.with_answer(row, text, images, answer)
            for row, text, images, answers in zip(rows, texts, own, lists, strict=True)
            for answer in answers
        ]
        if names is not None:
            names = [name for name, each in zip(names, lists, strict=True) for _ in each]
        flat = iter(self.service.score_rows(pairs, batch_size, names))
        scores = [[next(flat) for _ in answers] for answers in lists]
        return scores[0] if isinstance(prompts, str) else scores

    def logits(
        self,
        prompts: str | Sequence[str] | None = None,
        images: object = None,
        *,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        pixel_values: ArrayLike | None = None,
        image_token_id: int | None = None,
        adapters: Adapters = None,
    ) -> Float[Array, "B S V"]:
        """Next-token logits in fp32.

        Takes either prompts and images, or tokens with the conventions of `transformers`.

        Args:
          prompts: what the user says, one text (then B is 1) or a list of texts.
          images: for one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each.
          input_ids: `[B, S]` with one `image_token_id` per visual token.
          attention_mask: `[B, S]`, 0 for padding on either side; default all ones.
          pixel_values: `[images, 3, height, width]`, the images of all rows in order.
          image_token_id: the id that stands for a visual token.
          adapters: the name of the loaded adapter to use, or for every row its name or None for the
            base model.

        Raises:
          UserError: as `generate`, without prompts and token ids, and for image tokens that do not
            match the images.
        """
        if prompts is not None:
            rows = self.prompts.rows(*pair_images(prompts, images))
            if not rows:
                raise UserError("logits need at least one prompt")
            batch = self.prompts.batch(rows, max(map(len, rows)))
        elif input_ids is None:
            raise UserError("logits need prompts or input_ids")
        else:
            batch = hf_batch(
                input_ids, attention_mask, pixel_values, image_token_id, self.config.visual_tokens
            )
        names = self._adapter_names(adapters, len(batch.tokens))
        return self.service.logits(self.service.choose_adapters(batch, names))

    def _adapter_names(self, adapters: Adapters, rows: int) -> Sequence[str | None] | None:
        """The adapter of every row, from one name or a list of names.

        Raises:
          UserError: for an unknown adapter, or another number of adapters than rows.
        """
        names = [adapters] * rows if isinstance(adapters, str) else adapters
        adapter_ids(self._mllm.tuning, names, rows)
        return names


def _check_continuations(
    prompts: str | Sequence[str],
    continuations: Sequence[str] | Sequence[Sequence[str]],
    count: int,
) -> list[list[str]]:
    """The answers to score for every prompt.

    Raises:
      UserError: when answers cannot be assigned to prompts.
    """
    if isinstance(continuations, str):
        raise UserError("the answers to score must be a list of texts, got a single text")
    if isinstance(prompts, str):
        lists = [[*continuations]]
    elif any(isinstance(answers, str) for answers in continuations):
        raise UserError(f"{count} prompts need a list of answers each, got a list of texts")
    else:
        lists = [[*answers] for answers in continuations]
    if len(lists) != count:
        raise UserError(f"{count} prompts but {len(lists)} lists of answers")
    if any(not isinstance(answer, str) for answers in lists for answer in answers):
        raise UserError("an answer to score must be a text")
    return lists
