"""The public model: generate, score, logits, attach.

    import moresjax as mj
    model = mj.load("runs/finetune")
    model.generate("what is in the image?", "photo.jpg")

Axis legend: B rows, S tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.generation.beam import Beams
from moresjax.generation.hf_inputs import hf_batch
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.scoring import ContinuationScore
from moresjax.inference.activations import Activations, Write, run_batch
from moresjax.inference.arguments import Adapters, GenerateOptions, Marks, PromptOptions, Roi
from moresjax.inference.causes import Causes, CausesOptions, causes
from moresjax.inference.loaded_model import LoadedModel
from moresjax.inference.prompt_inputs import (
    Images,
    PromptImages,
    pair_continuations,
    pair_images,
    pair_pointed,
)
from moresjax.inference.prompts import Answer
from moresjax.inference.states import Item, StatesOptions, states
from moresjax.tuning.merge import merged


class Model(LoadedModel):
    """A multimodal LLM with its processor.

    >>> from moresjax.testing import talking_model
    >>> talking_model("mores:rank=2")  # `mj.load(folder)` gives a model of your own
    Model
      llm: 2 layers, 16 features, 4 heads, 37 tokens, 5,104 parameters
      vision: 2 layers, 8 features, 12 x 12 pixels, 1,680 parameters
      connector: mlp2x_gelu, 9 visual tokens per image, 416 parameters
      tuning: mores:rank=2, 132 trainable parameters

    Args:
      mllm: The Flax module, which belongs to this object from now on.
      processor: Tokenizer, template and image processor; None when the folder had no tokenizer.
      mesh: The devices that the parameters are on; None for a single device.
      engine_config: The knobs of generation.
      image_token_id: The id that stands for a visual token in ids that `transformers` made.

    Attributes:
      prompts: Turns texts and images into rows of tokens, and tokens into texts.
      service: Generates and scores for rows of tokens.
    """

    def merge(self) -> "Model":
        """The same model with LoRA, IA3 and the like folded into the weights; edits stay attached.

        >>> from moresjax.testing import talking_model
        >>> talking_model("lora:rank=2/mores:rank=2").merge().tuning
        'mores:rank=2'

        Raises:
          UserError: A weight delta cannot be merged, or several adapters are loaded.
        """
        mllm, settings = merged(self.mllm), self.service.config
        model = Model(mllm, self.processor, self.mesh, settings, self.image_token_id)
        model.restack()  # its parameters are on the mesh again
        return model

    def prompt(self, text: str, images: PromptImages = (), name: str = "prompt") -> Row:
        """The row of tokens that a prompt becomes, for `service`.

        Args:
          text: What the user says.
          images: One image or a list of images; without an `<image>` mark they go first.
          name: What error messages call the prompt.

        Raises:
          UserError: Marks and images do not agree, or an image is missing or broken.
        """
        return self.prompts.row(text, images, name)

    @overload
    def generate(
        self,
        prompts: str,
        images: Images = None,
        *,
        details: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: str,
        images: Images = None,
        *,
        details: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        images: Images = None,
        *,
        details: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        images: Images = None,
        *,
        details: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        images: Images = None,
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
        system: str | None = None,
        roi: Roi = None,
        marks: Marks = None,
    ) -> str | list[str] | Answer | list[Answer]:
        """Answers to prompts.

        >>> import numpy as np
        >>> from moresjax.testing import talking_model
        >>> model, image = talking_model(), np.zeros((12, 12, 3), np.uint8)
        >>> text = model.generate("what is the largest ?", image, max_new_tokens=2)
        >>> len(model.generate(["how many ?", "two ?"], [image, None], max_new_tokens=2))
        2
        >>> answer = model.generate("how many ?", details=True, logprobs=True, max_new_tokens=2)
        >>> answer.stop_reason, answer.tokens.shape == answer.logprobs.shape
        ('length', True)

        Args:
          prompts: What the user says, one text or a list of texts; `<image>` marks where an image
            goes, without marks images go first.
          images: For one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each. An image is a path, a PIL image or a uint8
            array `[Y, X, 3]`.
          max_new_tokens: An answer has at most this many tokens.
          adapters: The name of the loaded adapter that answers, or for every prompt its name or
            None for the base model.
          sampling: How tokens are chosen; greedy by default.
          seeds: The seed of every prompt's draws; default: `sampling.seed` for all.
          stop: An answer ends before the first of these strings.
          batch_size: How many prompts are answered at a time; default: all.
          num_beams: How many hypotheses a beam search follows; 1 for no search. A beam search goes
            with greedy choice and a single batch only.
          length_penalty: Above 0 a beam search prefers longer answers, below 0 shorter ones.
          early_stopping: When a beam search ends; see `Beams`.
          details: Whether to return `Answer`s, with tokens and stop reason, instead of texts.
          logprobs: Whether these answers have the log-probabilities of their tokens.
          system: The system prompt of all prompts; default: the template's.
          roi: What selectors `roi` mean: for one text a box (x0, y0, x1, y1) in shares of the
            image's sides, a list of boxes, or a list of these for each image; for a list of texts
            a list that has this for each. Or the name of a provider, such as `center(60%)`.
          marks: What selectors `mark(NAME)` mean: by name a piece of the text, or its first
            character and end; for a list of texts one mapping for all or a list of mappings.

        Returns:
          One answer for one text, a list of answers for a list of texts.

        Raises:
          UserError: A prompt is empty or too long, an image cannot be read or assigned to a prompt,
            an adapter is unknown, the template has no place for a system prompt, or options do not
            go together.
        """
        if logprobs and not details:
            raise UserError("logprobs=True needs details=True: a text has no log-probabilities")
        beams = Beams(num_beams, length_penalty, early_stopping)
        beams.check(sampling, stop=stop, batch_size=batch_size, logprobs=logprobs)
        texts, own = pair_images(prompts, images)
        names = self.adapter_names(adapters, len(texts))
        rows = self.prompts.rows(texts, own, system, *pair_pointed(prompts, roi, marks))
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
        images: Images = None,
        *,
        system: str | None = None,
        adapters: Adapters = None,
        batch_size: int = 8,
        **pointing: Unpack[PromptOptions],
    ) -> list[ContinuationScore]: ...
    @overload
    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        images: Images = None,
        *,
        system: str | None = None,
        adapters: Adapters = None,
        batch_size: int = 8,
        **pointing: Unpack[PromptOptions],
    ) -> list[list[ContinuationScore]]: ...
    def score(
        self,
        prompts: str | Sequence[str],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        images: Images = None,
        *,
        system: str | None = None,
        adapters: Adapters = None,
        batch_size: int = 8,
        **pointing: Unpack[PromptOptions],
    ) -> list[ContinuationScore] | list[list[ContinuationScore]]:
        """Log-likelihoods of given answers; a prompt and its images are read once for all of them.

        Prompt and answer are tokenised together, as the template writes them; the token that ends
        an answer is not scored.

        >>> from moresjax.testing import talking_model
        >>> yes, no = talking_model().score("is there a two ?", ["yes .", "no ."])
        >>> yes.num_tokens, yes.logprob < 0
        (2, True)

        Args:
          prompts: What the user says, one text or a list of texts.
          continuations: For one text its answers, for a list of texts a list of answers for each.
          images: For one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each.
          system: The system prompt of all prompts; default: the template's.
          adapters: The name of the loaded adapter that scores, or for every prompt its name or None
            for the base model.
          batch_size: How many prompts are read at a time.
          pointing: `roi` and `marks` of `generate`.

        Returns:
          The scores of one text's answers, or a list of these for a list of texts.

        Raises:
          UserError: As `generate`, and for an empty answer or answers that cannot be assigned to
            prompts.
        """
        texts, own = pair_images(prompts, images)
        lists = pair_continuations(prompts, continuations, len(texts))
        names = self.adapter_names(adapters, len(texts))
        regions, marks = pair_pointed(prompts, **pointing)
        rows = self.prompts.rows(texts, own, system, regions, marks)
        whole = zip(rows, texts, own, marks, lists, strict=True)
        pairs = [
            self.prompts.with_answer(row, text, images, answer, system, named)
            for row, text, images, named, answers in whole
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
        images: Images = None,
        *,
        system: str | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        pixel_values: ArrayLike | None = None,
        image_token_id: int | None = None,
        adapters: Adapters = None,
        **pointing: Unpack[PromptOptions],
    ) -> Float[Array, "B S V"]:
        """Next-token logits in fp32.

        Takes either prompts and images, or tokens with the conventions of `transformers`.

        >>> from moresjax.testing import talking_model
        >>> model = talking_model()
        >>> model.logits("is there a two ?").shape
        (1, 6, 37)
        >>> model.logits(input_ids=[[1, 5, 6]]).shape
        (1, 3, 37)

        Args:
          prompts: What the user says, one text (then B is 1) or a list of texts.
          images: For one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each.
          system: The system prompt of all prompts; default: the template's.
          input_ids: Token ids `[B, S]` with one `image_token_id` per visual token.
          attention_mask: `[B, S]`, 0 for padding on either side; default: all ones.
          pixel_values: The images of all rows in order, `[images, 3, height, width]`.
          image_token_id: The id that stands for a visual token; default: the model's own.
          adapters: The name of the loaded adapter to use, or for every row its name or None for the
            base model.
          pointing: `roi` and `marks` of `generate`, for prompts.

        Raises:
          UserError: As `generate`, without both prompts and token ids, and for image tokens that do
            not match the images.
        """
        if prompts is not None:
            paired, regions = pair_images(prompts, images), pair_pointed(prompts, **pointing)
            rows = self.prompts.rows(*paired, system, *regions)
            if not rows:
                raise UserError("logits need at least one prompt")
            batch = self.prompts.batch(rows, max(map(len, rows)))
        elif input_ids is None:
            raise UserError("logits need prompts or input_ids")
        else:
            image_id = self.image_token_id if image_token_id is None else image_token_id
            batch = hf_batch(
                input_ids,
                attention_mask,
                pixel_values,
                image_id,
                self.config.visual_tokens,
                self.config.llm.vocab_size,
            )
        names = self.adapter_names(adapters, len(batch.tokens))
        return self.service.logits(self.service.choose_adapters(batch, names))

    def run(
        self,
        prompts: str | Sequence[str],
        images: Images = None,
        *,
        read: str | Sequence[str] = (),
        edits: Mapping[Any, Write] | None = None,
        adapters: Adapters = None,
        system: str | None = None,
        **pointing: Unpack[PromptOptions],
    ) -> Activations:
        """One pass over prompts that reads activations at named sites, and writes them at others.

        >>> from moresjax.testing import talking_model
        >>> model = talking_model()
        >>> before = model.run("is there a two ?", read="llm.block.out")
        >>> before.states["llm.block.out"].shape  # layers, rows, tokens, features
        (2, 1, 6, 16)
        >>> halved = model.run("is there a two ?", edits={("llm.block.out", 0): lambda h: h / 2})
        >>> bool((halved.logits != before.logits).any())
        True

        What is written comes after the attached tuning's edits; what is read comes last.

        Args:
          prompts: What the user says, one text (then B is 1) or a list of texts.
          images: For one text an image or a list of images; for a list of texts a list that has an
            image, a list of images or None for each.
          read: The sites to read: `vision.block.out`, `connector.out`, `llm.embed.out`,
            `llm.block.out`, `llm.block.attn.out`, `llm.block.mlp.out`, `llm.norm.out`.
          edits: By a site, or by `(site, layer)`, what its activations are to be: a function of
            them, which JAX can trace, or an array that can be broadcast to them, in which nan
            leaves an activation as it is. A site inside the blocks stands for all of its layers.
          adapters: The name of the loaded adapter to use, or for every row its name or None.
          system: The system prompt of all prompts; default: the template's.
          pointing: `roi` and `marks` of `generate`.

        Raises:
          UserError: As `generate`; the model has no such site or layer, or an array or what a
            function gives has another shape than the activations.
        """
        paired, regions = pair_images(prompts, images), pair_pointed(prompts, **pointing)
        rows = self.prompts.rows(*paired, system, *regions)
        if not rows:
            raise UserError("a pass needs at least one prompt")
        names = self.adapter_names(adapters, len(rows))
        batch = self.service.batch(rows, max(map(len, rows)), names)
        sites = [read] if isinstance(read, str) else list(read)
        logits, found = run_batch(self.mllm, batch, sites, edits or {}, self.mesh)
        arrays = {site: np.asarray(x, np.float32) for site, x in found.items()}
        lengths = np.asarray([len(row) for row in rows])
        return Activations(np.asarray(logits), np.asarray(batch.tokens), lengths, arrays)

    def states(self, items: Sequence[Item], **options: Unpack[StatesOptions]) -> States:
        """Hidden states of answers, read while they are generated.

        >>> from moresjax.testing import talking_model
        >>> questions = ["is there a two ?", "what is the largest ?"]
        >>> states = talking_model().states(questions, site="llm.block.out", layers=1)
        >>> states.matrix().shape
        (2, 16)

        Args:
          items: What the model is asked: texts, or mappings with `prompt`, `images`, `id`,
            `answers`, `metadata`, `roi` and `marks`.
          options: `site`, `layers`, `take`, `match`, `max_new_tokens`, `batch_size`, `adapters`,
            `out`, `dtype` and `meta` of `moresjax.inference.states.states`.

        Raises:
          UserError: As `generate`; the model has no such site or layer, a word has no tokens, or
            the folder `out` holds other states.
        """
        return states(self, items, **options)

    def causes(self, prompt: str, images: PromptImages, **options: Unpack[CausesOptions]) -> Causes:
        """The effect on an answer of removing visual tokens, by editing a cache.

        >>> from moresjax.testing import talking_model
        >>> image = np.zeros((12, 12, 3), np.uint8)
        >>> talking_model().causes("how many ?", image, answer="two").effects.shape
        (1, 9)

        Args:
          prompt: What the user says.
          images: An image or a list of images.
          options: `answer`, `removal`, `other`, `regions`, `layers`, `reads`, `seed`, `adapters`,
            `batch_size`, `roi` and `marks` of `moresjax.inference.causes.causes`.

        Raises:
          UserError: As `generate`; there is no image, or an option has no such value.
        """
        return causes(self, prompt, images, **options)
