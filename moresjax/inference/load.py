"""Folders to models: those of runs and of Hugging Face."""

import dataclasses
import logging
from pathlib import Path

from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.types import Tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.region_providers import region_provider
from moresjax.data.samples import IMAGE_MARK
from moresjax.data.saved_processors import has_tokenizer, saved_template
from moresjax.data.templates import OWN, Template, get_template
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.config import read_config
from moresjax.runs.paths import is_workdir
from moresjax.runs.processor import load_tokenizer
from moresjax.runs.run_config import DEFAULT_TEMPLATE
from moresjax.runs.sources import earlier_template
from moresjax.runs.workdir import load_workdir
from moresjax.weights import steering
from moresjax.weights.edits import has_edits, read_edits
from moresjax.weights.families.base import MLLMFamily
from moresjax.weights.generation_config import read_generation_config
from moresjax.weights.hf import HFFolder, load_pretrained
from moresjax.weights.pyreft import import_pyreft

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    template: str | None = None,
    tuning: str | None = None,
    quantize: str | None = None,
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    image_aspect: str | None = None,
    split_special_tokens: bool | None = None,
    roi: str | None = None,
    dtype: str | None = None,
    engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
    vision_tower: str | Path | None = None,
) -> Model:
    """Loads a run's directory or a Hugging Face folder.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> from moresjax.weights.export import export_hf
    >>> folder = export_hf(tiny_model(), tempfile.mkdtemp())  # stands for a downloaded LLaVA
    >>> load(folder, tuning="mores:rank=2").tuning
    'mores:rank=2'

    Args:
      path: The folder.
      template: The conversation template; default: a run's own; for a Hugging Face folder the one
        that `export` noted in it, else its tokenizer's own for a Gemma 3, else `vicuna_v1`. A run
        whose own one drops questions (`plain`) is asked with that of the LLM it started from, where
        that is known; a warning says so.
      tuning: The spec of a tuning to attach, freshly initialised; `none` gives the model without
        tuning. Default: a run's own with its trained parameters, for a Hugging Face folder the
        edits that lie beside its weights.
      quantize: `int8` holds the LLM's blocks in eight bits; default: as the folder says.
      allow_pickle: Whether `*.bin` files may be read where a Hugging Face folder, or a folder that
        a run started from, has no safetensors.
      mesh: The devices to put the model on, see `Model.shard`; weights of Hugging Face folders are
        split as they are read, also those that a run started from.
      image_aspect: `square`, or `pad` as LLaVA-1.5 was trained and evaluated; default: as the
        folder says, which in `transformers`' LLaVA folders is a cut from the middle.
      split_special_tokens: Whether control tokens such as `</s>` in the text of users are read as
        the text that they are; `False` makes them control tokens, as LLaVA does. Default: a run's
        own, and `True` for a Hugging Face folder.
      roi: Where regions of interest come from where a call does not say it, such as `all` or
        `center(60%)`, see `moresjax.data.region_providers`; default: a run's own, and the `boxes`
        of prompts.
      dtype: The dtype of the activations: `float32`, `bfloat16`, `float16`, or `stored` for that of
        a Hugging Face folder's weights, which keep theirs. Default: a run's own; for a Hugging Face
        folder `stored` on TPUs and GPUs and `float32` on CPUs.
      engine_config: The knobs of generation and scores.
      vision_tower: The folder of the vision encoder of a LLaVA as its authors publish it; default:
        what its `config.json` names, also inside the folder or beside it.

    Raises:
      UserError: The folder is neither, or is damaged, or does not fit an argument.
    """
    path, image_token_id = Path(path), None
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if is_workdir(path):
        if vision_tower is not None:
            raise UserError(f"{path} is a run, which has its vision encoder; it takes no other")
        options = {"quantize": quantize, "allow_pickle": allow_pickle, "dtype": dtype}
        mllm, processor = load_workdir(path, tuning=tuning, mesh=mesh, **options)
        if template is not None:
            if processor is None:
                raise UserError(f"{path} has no tokenizer; template cannot be used")
            processor = dataclasses.replace(
                processor, template=get_template(template, processor.tokenizer)
            )
        elif processor is not None and not processor.template.keep_question:
            processor = _that_can_be_asked(processor, path)
    else:
        folder = HFFolder(path, allow_pickle=allow_pickle, vision_tower=vision_tower)
        mllm = load_pretrained(
            folder, tuning or "none", quantize=quantize or "", dtype=dtype or "auto", mesh=mesh
        )
        if tuning is None:
            attach_saved(mllm, path, allow_pickle=allow_pickle)
        processor = _saved_processor(folder, mllm.config, template or saved_template(path))
        has_mark = folder.family is not None and folder.family.image_mark
        image_token_id = folder.hf.get("image_token_index") if has_mark else None
    if image_aspect is not None:
        if processor is None or processor.image is None:
            raise UserError(f"{path} takes no images; image_aspect cannot be used")
        image = dataclasses.replace(processor.image, aspect=image_aspect)
        processor = dataclasses.replace(processor, image=image)
    if processor is not None:
        processor = _told(processor, split_special_tokens, roi)
    model = Model(mllm, processor, image_token_id=image_token_id, engine_config=engine_config)
    if mesh is not None:
        model.shard(mesh)
    return model


def _told(processor: Processor, split_special_tokens: bool | None, roi: str | None) -> Processor:
    """The processor with what a call says of texts and of regions."""
    if split_special_tokens is not None:
        processor = dataclasses.replace(processor, split_special_tokens=split_special_tokens)
    if roi is not None:
        processor = dataclasses.replace(processor, regions=region_provider(roi))
    return processor


def _that_can_be_asked(processor: Processor, workdir: Path) -> Processor:
    """The processor of a run that was trained with captions, with its LLM's earlier template."""
    config = read_config(workdir / "config.json")
    name, source = earlier_template(config, workdir)
    told = f"{workdir} was trained with template {config.template}, which drops every question"
    if not name:
        logger.warning("%s; to ask it some, give a template", told)
        return processor
    logger.warning(
        "%s; it is asked with template %s of %s, or the one you give", told, name, source
    )
    return dataclasses.replace(processor, template=get_template(name, processor.tokenizer))


def attach_saved(mllm: MLLM, path: Path, *, allow_pickle: bool = False) -> None:
    """Attaches what lies beside a folder's weights: edits of ours, or those of LLaVA Steering.

    Args:
      mllm: The model of the folder.
      path: The folder.
      allow_pickle: Whether the edits of LLaVA Steering may be read, which are pickled.

    Raises:
      UserError: when they cannot be read or do not belong to the model.
    """
    if has_edits(path):
        read_edits(mllm, path)
    elif (path / steering.PLACE).is_dir():
        import_pyreft(path / steering.PLACE, mllm, allow_pickle=allow_pickle)


def _saved_processor(folder: HFFolder, config: MLLMConfig, template: str) -> Processor | None:
    """The processor of a Hugging Face folder; None where no tokenizer was saved."""
    path = folder.path
    if not has_tokenizer(path):
        return None
    vision = config.vision
    tokenizer = load_tokenizer(str(path))
    family = folder.family
    if family is not None and (mark := family.image_mark) not in {"", *tokenizer.get_vocab()}:
        kind = "LLaVA" if mark == IMAGE_MARK else family.model_type
        raise UserError(f"{path}: the tokenizer has no {mark} token; it is no {kind}'s")
    image = None
    if vision is not None:
        mean, std = vision.pixel_mean, vision.pixel_std
        # TinyLLaVA Factory notes how images are made square; other formats do not.
        aspect = folder.raw.get("image_aspect_ratio", "square")
        image = ImageProcessor.from_pretrained(
            folder.image_folder, vision.image_size, aspect, mean=mean, std=std
        )
    return Processor(
        tokenizer,
        _template_of(family, tokenizer, template),
        image,
        config.visual_tokens,
        read_generation_config(path),
        config.llm.vocab_size,
    )


def _template_of(family: MLLMFamily | None, tokenizer: Tokenizer, name: str) -> Template:
    """The named template; without a name that of the folder, or of the model's family."""
    own = get_template(family.template) if family is not None and family.template else None
    if own is None or name not in ("", OWN):
        return get_template(name or DEFAULT_TEMPLATE, tokenizer)
    if not (name or tokenizer.chat_template):
        return own
    # A chat template writes of an image only where it stands; the family says with what around.
    written = get_template(OWN, tokenizer)
    return dataclasses.replace(written, around_image=own.around_image)
