"""Steering captions to words of a list, such as colours (`style:colors`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.data.word_lists import word_list
from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.style import has_word, style_counts
from moresjax.evaluation.steering.tasks import SentenceTask, SteeringTask, steering_task


class StyleTask(SentenceTask):
    """From captions at large to those with a word of a list.

    Args:
      name: The name in results.
      words: The list.
    """

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.name, self.words = f"style:{name}", tuple(words)

    def is_target(self, answer: str) -> bool:
        """Whether a caption has a word of the list."""
        return has_word(answer, self.words)

    def source_state(self, row: Mapping[str, Any]) -> bool:
        """Every caption: the base is the mean of all."""
        return True

    def metrics(
        self, examples: Sequence[Example], baseline: Sequence[str], steered: Sequence[str]
    ) -> dict[str, Any]:
        """Captions with a word of the list, words of it, and the words, before and after."""
        before, after = (style_counts(x, self.words) for x in (baseline, steered))
        ranked = sorted(
            {**before.by_word, **after.by_word},
            key=lambda word: (-after.by_word.get(word, 0), word),
        )
        return {
            "captions": [before.captions, after.captions],
            "words": [before.words, after.words],
            "by_word": {
                word: [before.by_word.get(word, 0), after.by_word.get(word, 0)]
                for word in ranked[:20]
            },
        }


@steering_task("style")
def style(argument: str) -> SteeringTask:
    """`style:colors`: a list of the package, a file of words, or words between semicolons."""
    if not argument:
        raise UserError("the steering task style takes a list of words, as in style:colors")
    if ";" in argument:
        return StyleTask("words", [word for word in argument.split(";") if word])
    return StyleTask(Path(argument).stem, word_list(argument))
