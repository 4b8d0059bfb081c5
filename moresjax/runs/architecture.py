"""From the names and fields of a configuration to the architecture of a model."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from moresjax.core.errors import UserError, choice_error
from moresjax.models.decoder import DecoderConfig, quantized
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.models.zoo import ENCODERS, LLMS
from moresjax.runs.run_config import PartChoice, RunConfig

Part = TypeVar("Part", DecoderConfig, VisionConfig, FusedVisionConfig)


def model_config(config: RunConfig) -> MLLMConfig:
    """The architecture that a run's configuration names.

    Raises:
      UserError: for an unknown name or field.
    """
    llm = quantized(_part("LLM", config.model.llm, LLMS, DecoderConfig), config.quantize)
    vision = vision_config(config.model.vision)
    changes: dict[str, Any] = {"dtype": config.dtype} if config.dtype else {}
    changes |= {"remat": True} if config.remat else {}
    llm = dataclasses.replace(llm, **changes, attention=config.attention)
    vision = _with_changes(vision, changes)
    if count := num_trainable_blocks(config.also_train):
        if not isinstance(vision, VisionConfig):
            raise UserError(f"also_train vision:last{count} needs one vision encoder")
        vision = dataclasses.replace(vision, num_trainable_blocks=count)
    return MLLMConfig(llm=llm, vision=vision, connector=config.model.connector)


def num_trainable_blocks(also_train: Sequence[str]) -> int:
    """N of the pattern `vision:lastN`, 0 without it."""
    found = [m for pattern in also_train if (m := re.fullmatch(r"vision:last(\d+)", pattern))]
    return int(found[0][1]) if found else 0


def vision_config(choice: PartChoice) -> AnyVisionConfig | None:
    """A vision encoder by its name or fields; `encoders` (two of these) and `fusion` make a pair.

    Returns:
      None for an empty name or no fields.

    Raises:
      UserError: for an unknown name or field.
    """
    if not choice:
        return None
    if isinstance(choice, str) or "encoders" not in choice:
        return _part("vision encoder", choice, ENCODERS, VisionConfig)
    fields = {**choice, "encoders": tuple(vision_config(each) for each in choice["encoders"])}
    return _part("vision encoder", fields, {}, FusedVisionConfig)


def _with_changes(
    vision: AnyVisionConfig | None, changes: Mapping[str, Any]
) -> AnyVisionConfig | None:
    """The encoder, or both of a pair, with some fields changed."""
    if vision is None:
        return None
    if isinstance(vision, FusedVisionConfig):
        encoders = tuple(dataclasses.replace(encoder, **changes) for encoder in vision.encoders)
        return dataclasses.replace(vision, encoders=encoders)
    return dataclasses.replace(vision, **changes)


def _part(what: str, choice: PartChoice, named: Mapping[str, Part], kind: type[Part]) -> Part:
    """The part of that name, or one of these fields."""
    if isinstance(choice, str):
        if choice not in named:
            raise choice_error(what, choice, named)
        return named[choice]
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in choice:
        if key not in fields:
            raise choice_error(f"field of {what}", key, fields)
    return kind(**choice)
