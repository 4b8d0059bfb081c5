"""A rephraser that is a text LLM tuned on pairs of questions."""

import dataclasses

from moresjax.data.control.rephrase import INSTRUCTION
from moresjax.inference.model import Model


@dataclasses.dataclass
class ModelRephraser:
    """Rephrases with a text LLM that was tuned on the source `rephrasing`.

    >>> from moresjax.testing import talking_model
    >>> rephraser = ModelRephraser(talking_model(), max_new_tokens=2)
    >>> rephraser("is a three there ?") == rephraser("is a three there ?")
    True

    Attributes:
      model: The tuned LLM; its template is that of its training.
      max_new_tokens: The most tokens of a question.
    """

    model: Model
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, text: str, /) -> str:
        """The rephrased question; each is generated once."""
        if text not in self._known:
            question = self.model.generate(INSTRUCTION + text, max_new_tokens=self.max_new_tokens)
            self._known[text] = question.strip()
        return self._known[text]
