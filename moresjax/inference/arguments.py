"""The types of what `Model` is called with."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from moresjax.generation.sampling import Sampling

Adapters = str | Sequence[str | None] | None
# Boxes of the images of one prompt or of each, or the name of a provider.
Roi = str | Sequence[Any] | None
# Pieces of one prompt by name, or of each prompt.
Marks = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None


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
    system: str | None
    roi: Roi
    marks: Marks


class PromptOptions(TypedDict, total=False):
    """Keyword arguments of `Model.score`, `logits` and `run` that say more of the prompts."""

    roi: Roi
    marks: Marks
