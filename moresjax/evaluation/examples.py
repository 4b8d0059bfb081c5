"""One question of a benchmark."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its images and its true answer.

    Attributes:
      id: The name of the question in the benchmark's own result files.
      prompt: The user's turn; `<image>` marks where an image goes.
      answer: What the metric compares a prediction with: a text, ten annotators' texts, reference
        captions; None when only a server knows it.
      images: Paths, PIL images, uint8 arrays `[Y, X, 3]`, the bytes of image files, or an
        `UnusableImage`, over which only this question fails.
      choices: Texts that are ranked by log-likelihood; without any, the model writes the answer.
      metadata: What scorers and summaries need beside the answer, such as the question's type.
      max_new_tokens: The length limit of this answer; None for the task's.
      roi: The boxes of its images, for tunings that act on regions; None: nothing is said.
      marks: Pieces of the prompt by name, for tunings that act on them.
    """

    id: str
    prompt: str
    answer: Any = None
    images: tuple[Any, ...] = ()
    choices: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None
    roi: Any = None
    marks: Any = None

    @property
    def pointed(self) -> dict[str, Any]:
        """What it says of regions and marks, as `PromptEncoder.row` takes them."""
        said = {"roi": self.roi, "marks": self.marks}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def own_limit(self) -> dict[str, int]:
        """The example's own length limit, as rows of predictions note it; empty without one."""
        return {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
