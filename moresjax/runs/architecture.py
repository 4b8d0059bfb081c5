"""From the names and fields of a configuration to the architecture of a model."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import FINITE, check_value, ranges_of
from moresjax.models.contrastive import ContrastiveModel
from moresjax.models.decoder import DecoderConfig, quantized
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import PatchClassifier, VisionConfig
from moresjax.models.zoo import ENCODERS, LLMS
from moresjax.runs.run_config import PartChoice, RunConfig

# What a run may train.
AnyModel = MLLM | PatchClassifier | ContrastiveModel
# The connector of a run that does not name one.
DEFAULT_CONNECTOR = "mlp2x_gelu"


def model_config(config: RunConfig) -> MLLMConfig:
    """The architecture that a run's configuration names.

    Raises:
      UserError: for an unknown name or field.
    """
    llm = quantized(llm_config(config.model.llm), config.quantize)
    llm = dataclasses.replace(llm, **_changes(config), attention=config.attention)
    connector = config.model.connector or DEFAULT_CONNECTOR
    return MLLMConfig(llm=llm, vision=_vision(config), connector=connector)


def _changes(config: RunConfig) -> dict[str, Any]:
    """What a run says of all parts."""
    changes: dict[str, Any] = {"dtype": config.dtype} if config.dtype else {}
    return changes | ({"remat": True} if config.remat else {})


def _vision(config: RunConfig) -> AnyVisionConfig | None:
    """The vision encoder as a run has it; None without one."""
    vision = vision_config(config.model.vision)
    vision = _with_changes(vision, _changes(config)) if vision else None
    if count := num_trainable_blocks(config.also_train):
        if not isinstance(vision, VisionConfig):
            raise UserError(f"also_train vision:last{count} needs one vision encoder")
        vision = dataclasses.replace(vision, num_trainable_blocks=count)
    return vision


def new_model(config: RunConfig) -> AnyModel:
    """The model of a configuration; it holds shapes only, until its parameters are set.

    Raises:
      UserError: for an unknown name or field, or an objective without its model.
    """
    if config.is_language_model:
        return MLLM(model_config(config), config.tuning)
    vision = _vision(config)
    if not isinstance(vision, VisionConfig):
        found = "has none" if vision is None else "is a pair"
        raise UserError(f"objective {config.objective} needs one vision encoder, this {found}")
    if config.objective == "siglip":
        return ContrastiveModel(vision, model_config(config).llm)
    return PatchClassifier(vision, config.model.classes)


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
    if isinstance(choice, str):
        if choice not in ENCODERS:
            raise choice_error("vision encoder", choice, ENCODERS)
        return ENCODERS[choice]
    if "encoders" not in choice:
        check_fields("vision encoder", choice, VisionConfig)
        return VisionConfig(**choice)
    fields = {**choice, "encoders": tuple(vision_config(each) for each in choice["encoders"])}
    check_fields("vision encoder", fields, FusedVisionConfig)
    return FusedVisionConfig(**fields)


def _with_changes(vision: AnyVisionConfig, changes: Mapping[str, Any]) -> AnyVisionConfig:
    """The encoder, or both of a pair, with some fields changed."""
    if isinstance(vision, FusedVisionConfig):
        encoders = tuple(dataclasses.replace(each, **changes) for each in vision.encoders)
        return dataclasses.replace(vision, encoders=encoders)
    return dataclasses.replace(vision, **changes)


def llm_config(choice: PartChoice) -> DecoderConfig:
    """The LLM of that name, or one of these fields.

    Raises:
      UserError: for an unknown name or field, or neither.
    """
    if not choice:
        raise UserError(
            "the run has no LLM: give config key model.llm, or init.llm, which says what it is"
        )
    if isinstance(choice, str):
        if choice not in LLMS:
            raise choice_error("LLM", choice, LLMS)
        return LLMS[choice]
    check_fields("LLM", choice, DecoderConfig)
    return DecoderConfig(**choice)


def check_fields(what: str, values: Mapping[str, Any], kind: type) -> None:
    """Refuses names that are no fields of a part's configuration, and numbers out of range.

    Raises:
      UserError: names the field, and those there are, its type or its range; or the fields that are
        missing.
    """
    ranges, types = ranges_of(kind), typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in types:
            raise choice_error(f"field of {what}", key, types)
        wanted = types[key]
        whole = type(value) is int and wanted is float
        if wanted in (int, float, bool, str) and type(value) is not wanted and not whole:
            raise UserError(f"{key} of the {what} must be {wanted.__name__}, got {value!r}")
        check_value(f"{key} of the {what}", value, ranges.get(key, FINITE))
    if missing := missing_fields(values, kind):
        raise UserError(f"{what} needs {', '.join(missing)}")


def missing_fields(values: Mapping[str, Any], kind: type) -> list[str]:
    """The fields without a default that a part's configuration still needs."""
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
