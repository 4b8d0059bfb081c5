"""Helpers for tests and examples: models that exist without files."""

from moresjax.testing.models import (
    TINY_LLM,
    TINY_VISION,
    digits_processor,
    talking_model,
    tiny_config,
    tiny_model,
)

__all__ = [
    "TINY_LLM",
    "TINY_VISION",
    "digits_processor",
    "talking_model",
    "tiny_config",
    "tiny_model",
]
