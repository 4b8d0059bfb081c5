"""The tokenizer, the conversation template and the image processor of a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import GenerationDefaults, Processor, word_ids
from moresjax.data.region_providers import region_provider
from moresjax.data.saved_processors import check_tokenizer
from moresjax.data.templates import get_template
from moresjax.models.connector import connector_tokens
from moresjax.models.fusion import AnyVisionConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.runs.architecture import (
    DEFAULT_CONNECTOR,
    llm_config,
    model_config,
    vision_config,
)
from moresjax.runs.paths import locate
from moresjax.runs.run_config import RunConfig
from moresjax.tuning.attach import Tuning, edit_selectors
from moresjax.tuning.selectors import Selector, mark_names
from moresjax.tuning.spec import parse_spec
from moresjax.weights.generation_config import read_generation_config


def build_processor(config: RunConfig, *, root: str | Path = ".") -> Processor:
    """Tokenizer, template and image processor of a configuration.

    Args:
      config: The run's configuration.
      root: The run's directory, from which paths with a leading dot start.

    Raises:
      UserError: for an unknown template, or a folder without tokenizer or image processor.
    """
    vision = vision_config(config.model.vision)
    tokens = 0
    if vision:
        # Where images do not enter the LLM, one token says that there is one.
        connected = config.is_language_model
        connector = config.model.connector or DEFAULT_CONNECTOR
        tokens = connector_tokens(connector, vision.num_tokens) if connected else 1
    # Labels of images have no words.
    wordless = config.objective == "patch_classes"
    name = config.tokenizer or ("digits" if wordless else "")
    tokenizer = load_tokenizer(name, root)
    processor = Processor(
        tokenizer=tokenizer,
        template=get_template(config.template, tokenizer),
        image=_image_processor(config, vision, Path(root)) if vision else None,
        visual_tokens=tokens,
        split_special_tokens=config.split_special_tokens,
        regions=region_provider(config.roi),
        generation=GenerationDefaults() if wordless else _generation(config, root),
        vocab_size=0 if wordless else llm_config(config.model.llm).vocab_size,
    )
    if not config.is_language_model:
        return processor
    selectors = edit_selectors(parse_spec(config.tuning))
    return serving(processor, selectors, model_config(config))


def serving(processor: Processor, selectors: Sequence[Selector], config: MLLMConfig) -> Processor:
    """The processor whose rows say what selectors want to know: marks and regions of interest.

    Args:
      processor: Any processor of the model.
      selectors: The selectors of the attached edits.
      config: The architecture of the model.

    Raises:
      UserError: The selectors name too many marks.
    """
    marks, centres = mark_names(selectors), None
    if any(selector.uses_roi for selector in selectors):
        centres = config.visual_token_centres()
    if (marks, centres is not None) == (processor.marks, bool(processor.centres)):
        return processor
    places = () if centres is None else tuple((x, y) for x, y in centres.tolist())
    return dataclasses.replace(processor, marks=marks, centres=places)


def _generation(config: RunConfig, root: str | Path) -> GenerationDefaults:
    """What the folder of the tokenizer says about generation."""
    if config.tokenizer == "digits":
        return GenerationDefaults()
    return read_generation_config(locate(config.tokenizer, root))


def _image_processor(config: RunConfig, vision: AnyVisionConfig, root: Path) -> ImageProcessor:
    size, aspect = vision.image_size, config.image_aspect
    if not config.image_processor:
        mean, std = ((r, g, b) for r, g, b in (vision.pixel_mean, vision.pixel_std))
        return ImageProcessor(size, mean, std, aspect)
    folder = locate(config.image_processor, root)
    mean, std = vision.pixel_mean, vision.pixel_std
    return ImageProcessor.from_pretrained(folder, size, aspect, mean=mean, std=std)


def load_tokenizer(name: str, root: str | Path = ".") -> Any:
    """A fast tokenizer of `transformers`.

    Args:
      name: `digits`, the words of the built-in world, or the folder of a tokenizer.
      root: The run's directory, from which a path with a leading dot starts.

    Raises:
      UserError: when the folder has no tokenizer, or one with a setting that would be ignored.
    """
    if name == "digits":
        from moresjax.data.digits import build_tokenizer

        return build_tokenizer()
    from transformers import AutoTokenizer

    if not name:
        raise UserError("the run has no tokenizer: give config key tokenizer, 'digits' or a folder")
    folder = locate(name, root)
    if not folder.is_dir():
        raise UserError(f"tokenizer {name!r} is neither 'digits' nor a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} has no tokenizer that can be used: {reason}") from None
    check_tokenizer(folder, tokenizer)
    return tokenizer


def name_words(tuning: Tuning, tokenizer: Any) -> None:
    """Tells a tuning the token ids of the words that its selectors name.

    Raises:
      UserError: for a word that is no token.
    """
    tuning.words = tuple((word, word_ids(tokenizer, word)) for word in tuning.selected_words)
