"""What a benchmark asks."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: as in the benchmark's own result files.
      prompt: the user's turn; `<image>` marks where an image goes.
      answer: what the metric compares with: a text, ten texts, captions; None when only a server
        knows it.
      images: paths, PIL images, uint8 arrays, or bytes of files.
      choices: texts to rank by log-likelihood instead of generating one.
      facts: what summaries need beside the answer.
    """

    id: str
    prompt: str
    answer: Any = None
    images: tuple[Any, ...] = ()
    choices: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
