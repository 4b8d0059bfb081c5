"""Folders to models: those of runs and of Hugging Face."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK
from moresjax.data.templates import get_template
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLMConfig
from moresjax.runs.build import is_workdir, load_tokenizer, load_workdir
from moresjax.weights.hf import is_llava, load_pretrained


def load(
    path: str | Path,
    *,
    template: str | None = None,
    tuning: str | None = None,
    quantize: str | None = None,
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    image_aspect: str | None = None,
) -> Model:
    """Loads a run's directory or a Hugging Face folder.

    Args:
      path: the folder.
      template: conversation template; a run has its own, a Hugging Face folder `vicuna_v1`.
      tuning: attached to a Hugging Face folder's model.
      quantize: `int8` holds the LLM's blocks in eight bits; default: as the folder says.
      allow_pickle: whether a Hugging Face folder's `*.bin` files may be read.
      mesh: see `Model.shard`; weights of a Hugging Face folder are split as they are read.
      image_aspect: `square`, or `pad` as LLaVA-1.5 was trained and evaluated; default: as the
        folder says, which in `transformers`' LLaVA folders is a cut from the middle.

    Raises:
      UserError: when the folder is neither, or is damaged, or the model takes no images.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if is_workdir(path):
        mllm, processor = load_workdir(
            path, tuning=tuning, quantize=quantize, allow_pickle=allow_pickle
        )
        if template is not None and processor is not None:
            processor = dataclasses.replace(
                processor, template=get_template(template, processor.tokenizer)
            )
    else:
        options = {"quantize": quantize or "", "allow_pickle": allow_pickle, "mesh": mesh}
        mllm = load_pretrained(path, tuning or "none", **options)
        processor = _saved_processor(path, mllm.config, template or "vicuna_v1")
    if image_aspect is not None:
        if processor is None or processor.image is None:
            raise UserError(f"{path} takes no images; image_aspect cannot be used")
        image = dataclasses.replace(processor.image, aspect=image_aspect)
        processor = dataclasses.replace(processor, image=image)
    model = Model(mllm, processor)
    if mesh is not None:
        model.shard(mesh)
    return model


def _saved_processor(path: Path, config: MLLMConfig, template: str) -> Processor | None:
    """The processor of a Hugging Face folder; None where no tokenizer was saved."""
    if not has_tokenizer(path):
        return None
    vision = config.vision
    tokenizer = load_tokenizer(str(path))
    if is_llava(path) and IMAGE_MARK not in tokenizer.get_vocab():
        raise UserError(f"{path}: the tokenizer has no {IMAGE_MARK} token; it is no LLaVA's")
    return Processor(
        tokenizer,
        get_template(template, tokenizer),
        ImageProcessor.from_pretrained(path, vision.image_size) if vision else None,
        config.visual_tokens,
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer of `transformers` was saved in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
