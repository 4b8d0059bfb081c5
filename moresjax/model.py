"""The public model: load, generate, score, attach.

    import moresjax as mj
    model = mj.load("runs/finetune")
    model.generate(["what is in the image?"], images=[["photo.jpg"]])

Axis legend: B rows, S tokens, V vocabulary, N images per row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moresjax.build import is_workdir, load_tokenizer, load_workdir, name_words
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor, Row
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.data.templates import get_template
from moresjax.errors import UserError
from moresjax.generation.engine import Engine, Generation, bucket
from moresjax.layout import Batch, Segment, TokenLayout
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.tuning.base import Probe
from moresjax.tuning.many import adapter_numbers
from moresjax.tuning.merge import merged
from moresjax.weights.adapter import attach_adapter, load_adapters
from moresjax.weights.hf import is_llava, load_pretrained


class Model:
    """A multimodal LLM with its processor.

    Attributes:
      mllm: the Flax module.
      processor: tokenizer, template and image processor; None when the folder had no tokenizer.
    """

    def __init__(self, mllm: MLLM, processor: Processor | None):
        self.mllm, self.processor = mllm, processor
        self._engines: dict[tuple, Engine] = {}
        self._name_words()

    def _name_words(self) -> None:
        if self.processor is not None:
            name_words(self.mllm.tuning, self.processor.tokenizer)

    @property
    def config(self) -> MLLMConfig:
        return self.mllm.config

    @property
    def tuning(self) -> str:
        """Spec string of the attached tuning."""
        return self.mllm.tuning.spec

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        Raises:
          UserError: when the spec is malformed or does not fit the model.
        """
        self.mllm.attach(tuning, seed=seed)
        self._name_words()
        self._engines.clear()

    def load_adapter(self, folder: str | Path) -> None:
        """Replaces the attached tuning by an adapter folder, our own or one of `peft`.

        Raises:
          UserError: when the folder is neither, or does not belong to this model.
        """
        attach_adapter(self.mllm, folder)
        self._name_words()
        self._engines.clear()

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
        self._engines.clear()

    def merge(self) -> "Model":
        """The same model with LoRA, IA3 and the like folded into the weights; edits stay attached.

        Raises:
          UserError: when a weight delta cannot be merged.
        """
        return Model(merged(self.mllm), self.processor)

    def engine(self, probes: Sequence[Probe] = ()) -> Engine:
        """The generation engine with these probes; kept between calls."""
        key = tuple(probes)
        if key not in self._engines:
            tokenizer = self._need_processor().tokenizer
            pad = tokenizer.pad_token_id
            eos = self.processor.eos_ids
            self._engines[key] = Engine(
                self.mllm, eos_ids=eos, pad_id=eos[0] if pad is None else pad, probes=probes
            )
        return self._engines[key]

    def prompt(self, text: str, images: Sequence = (), name: str = "prompt") -> Row:
        """The unpadded row of a one-turn prompt. Images without an `<image>` mark go first.

        Raises:
          UserError: when marks and images do not agree.
        """
        if not text.strip() and not images:
            raise UserError("the prompt is empty")
        if IMAGE_MARK not in text:
            text = (IMAGE_MARK + "\n") * len(images) + text
        return self._need_processor().row(Sample(name, (Turn(text),), tuple(images)))

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence] | None = None,
        *,
        max_new_tokens: int = 128,
        adapters: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Greedy answers to prompts.

        Args:
          prompts: user texts; `<image>` marks where an image goes.
          images: for every prompt its images (paths, PIL images or uint8 arrays).
          max_new_tokens: at most this many tokens each.
          adapters: for every prompt the name of a loaded adapter, or None for the base model.

        Raises:
          UserError: for an empty prompt, an unreadable image, marks without images, or an unknown
            adapter.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(images)} lists of images")
        rows = [
            self.prompt(p, i, f"prompt {n}")
            for n, (p, i) in enumerate(zip(prompts, images, strict=True))
        ]
        return self.decode(self.generate_rows(rows, max_new_tokens, adapters=adapters))

    def generate_rows(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        probes: Sequence[Probe] = (),
        adapters: Sequence[str | None] | None = None,
    ) -> Generation:
        """Continues prompt rows as one batch, padded to a bucket length."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        processor = self._need_processor()
        length = bucket(max(len(row["tokens"]) for row in rows))
        images = max(len(row.get("pixels", ())) for row in rows)
        batch = processor.batch([processor.pad(row, length, images) for row in rows])
        batch = self._choose(batch, adapters)
        return self.engine(probes).generate(batch, max_new_tokens)

    def decode(self, generation: Generation) -> list[str]:
        """Texts of a generation, special tokens left out."""
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.length)
        tokenizer = self._need_processor().tokenizer
        return [
            tokenizer.decode(row[:n], skip_special_tokens=True).strip()
            for row, n in zip(tokens, lengths, strict=True)
        ]

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
            processor = self._need_processor()
            images = [()] * len(prompts) if images is None else images
            rows = [self.prompt(p, i) for p, i in zip(prompts, images, strict=True)]
            length = max(len(row["tokens"]) for row in rows)
            most = max(len(row.get("pixels", ())) for row in rows)
            batch = processor.batch([processor.pad(row, length, most) for row in rows])
        else:
            batch = hf_batch(
                input_ids, attention_mask, pixel_values, image_token_id, self.config.visual_tokens
            )
        graphdef, state = nnx.split(self.mllm)
        return _logits(graphdef, state, self._choose(batch, adapters))

    def _choose(self, batch: Batch, adapters: Sequence[str | None] | None) -> Batch:
        numbers = adapter_numbers(self.mllm.tuning, adapters, len(batch.tokens))
        return dataclasses.replace(batch, adapter=numbers)

    def _need_processor(self) -> Processor:
        if self.processor is None:
            raise UserError("this model was loaded without a tokenizer; text cannot be used")
        return self.processor


def _forward(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    return model.llm.logits(model(batch).hidden)


_logits = jax.jit(_forward, static_argnums=0)


def hf_batch(
    input_ids, attention_mask=None, pixel_values=None, image_token_id=None, visual_tokens: int = 0
) -> Batch:
    """A batch from tokens with the conventions of `transformers` (see `Model.logits`)."""
    ids = np.asarray(input_ids, np.int32)
    valid = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask) > 0
    is_image = (
        (ids == image_token_id) & valid if image_token_id is not None else np.zeros_like(valid)
    )
    counts = is_image.sum(1)
    per_row = counts // max(visual_tokens, 1)
    given = 0 if pixel_values is None else len(pixel_values)
    if (counts != per_row * visual_tokens).any() or per_row.sum() != given:
        raise UserError(
            f"{counts.sum()} image tokens do not match {given} images of {visual_tokens} tokens"
        )
    image = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32)
    segment = np.where(valid, np.where(is_image, Segment.IMAGE, Segment.QUESTION), Segment.PAD)
    zeros = np.zeros_like(ids)
    layout = TokenLayout(
        segment=segment.astype(np.int32),
        image=image,
        position=np.where(valid, np.cumsum(valid, axis=1) - 1, 0).astype(np.int32),
        document=zeros,
        branch=zeros,
        visual_tokens=visual_tokens,
    )
    if not given:
        return Batch(ids, layout)
    pixel_values = np.asarray(pixel_values, np.float32).transpose(0, 2, 3, 1)
    pixels = np.zeros((len(ids), per_row.max(), *pixel_values.shape[1:]), np.float32)
    first = np.cumsum(per_row) - per_row
    for row, (start, count) in enumerate(zip(first, per_row, strict=True)):
        pixels[row, :count] = pixel_values[start : start + count]
    return Batch(jnp.asarray(ids), layout, jnp.asarray(pixels))


def load(
    path: str | Path,
    *,
    template: str | None = None,
    tuning: str = "none",
    quantize: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Loads a run's directory or a Hugging Face folder.

    Args:
      path: the folder.
      template: conversation template; a run has its own, a Hugging Face folder `vicuna_v1`.
      tuning: attached to a Hugging Face folder's model.
      quantize: `int8` holds the LLM's blocks in eight bits; default: as the folder says.
      allow_pickle: whether a Hugging Face folder's `*.bin` files may be read.

    Raises:
      UserError: when the folder is neither, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if is_workdir(path):
        mllm, processor = load_workdir(path, quantize=quantize)
        if template is not None:
            processor = dataclasses.replace(
                processor, template=get_template(template, processor.tokenizer)
            )
        return Model(mllm, processor)
    mllm = load_pretrained(path, tuning, quantize=quantize or "", allow_pickle=allow_pickle)
    processor = None
    if has_tokenizer(path):
        vision = mllm.config.vision
        tokenizer = load_tokenizer(str(path))
        if is_llava(path) and IMAGE_MARK not in tokenizer.get_vocab():
            raise UserError(f"{path}: the tokenizer has no {IMAGE_MARK} token; it is no LLaVA's")
        processor = Processor(
            tokenizer,
            get_template(template or "vicuna_v1", tokenizer),
            ImageProcessor.from_pretrained(path, vision.image_size) if vision else None,
            mllm.config.visual_tokens,
        )
    return Model(mllm, processor)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer of `transformers` was saved in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
