"""Whether a part's weights are of the architecture that a model has, which shapes may not show."""

import dataclasses
import logging
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.models.decoder import DecoderConfig
from moresjax.models.fusion import AnyVisionConfig
from moresjax.models.vision import VisionConfig
from moresjax.weights.fingerprint import FREE_FIELDS
from moresjax.weights.vision_folder import check_same_encoder

logger = logging.getLogger(__name__)

# The architecture of a part; a connector is its name.
PartConfig = DecoderConfig | AnyVisionConfig | str


def check_same_part(
    part: str, ours: PartConfig, theirs: PartConfig, source: Path, *, warn: bool = False
) -> None:
    """Refuses a part of another architecture.

    Args:
      part: `llm`, `vision` or `connector`.
      ours: What the model has.
      theirs: What the source of its weights has.
      source: That source, for the message.
      warn: Whether to tell of a difference in `norm_eps`, in which releases of one family differ.

    Raises:
      UserError: Names the first field that differs, and both values.
    """
    if isinstance(ours, DecoderConfig) and isinstance(theirs, DecoderConfig):
        _check_same_llm(ours, theirs, source, warn)
    elif isinstance(ours, VisionConfig) and isinstance(theirs, VisionConfig):
        check_same_encoder(ours, theirs, f"init.{part}: {source}")
    elif isinstance(ours, str) and ours != theirs:
        raise UserError(f"init.{part}: {source} has a {theirs}, the model a {ours}")


def _check_same_llm(ours: DecoderConfig, theirs: DecoderConfig, source: Path, warn: bool) -> None:
    free = {*FREE_FIELDS, "max_positions"}
    if "default" == ours.rope_scaling == theirs.rope_scaling:  # what scaling alone uses
        free |= {"rope_factor", "rope_low_turns", "rope_high_turns", "rope_original_positions"}
    if not any((*ours.local_layers, *theirs.local_layers)):
        free |= {"attention_pattern", "window", "local_rope_theta"}
    if "learned" == ours.positions == theirs.positions:
        free |= {"rope_theta", "rotary_fraction"}
    for name, value in dataclasses.asdict(theirs).items():
        own = getattr(ours, name)
        if name in free or own == value:
            continue
        message = f"init.llm: {source} has another LLM: its {name} is {value}, the model's {own}"
        if name != "norm_eps":
            raise UserError(message)
        if warn:
            logger.warning(message)
