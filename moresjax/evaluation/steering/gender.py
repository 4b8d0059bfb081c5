"""Steering captions from gendered to neutral words for people (`gender`).

The words are our own lists. What a caption says is compared with its references: where these agree
on a gender, a neutral caption loses a fact; where they do not, a gendered one invents it.
"""

from collections.abc import Sequence
from typing import Any

from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.style import has_word
from moresjax.evaluation.steering.tasks import (
    SentenceTask,
    SteeringTask,
    no_argument,
    steering_task,
)

FEMALE = (
    *("woman", "women", "girl", "girls", "lady", "ladies", "female", "females", "she", "her"),
    *("hers", "herself", "mother", "daughter", "sister", "wife", "actress", "waitress"),
)
MALE = (
    *("man", "men", "boy", "boys", "gentleman", "gentlemen", "guy", "guys", "male", "males"),
    *("he", "him", "his", "himself", "father", "son", "brother", "husband", "actor", "waiter"),
)
NEUTRAL = (
    *("person", "persons", "people", "someone", "somebody", "individual", "individuals", "child"),
    *("children", "kid", "kids", "adult", "adults", "they", "them", "their", "player", "players"),
    *("rider", "skier", "surfer", "skateboarder", "snowboarder", "pedestrian", "human"),
)


class GenderTask(SentenceTask):
    """From captions with a gendered word to captions with neutral words for people only."""

    name = "gender"

    def is_source(self, answer: str) -> bool:
        """Whether a caption has a gendered word."""
        return has_word(answer, (*FEMALE, *MALE))

    def is_target(self, answer: str) -> bool:
        """Whether a caption names people, and no gender."""
        return has_word(answer, NEUTRAL) and not self.is_source(answer)

    def metrics(
        self, examples: Sequence[Example], baseline: Sequence[str], steered: Sequence[str]
    ) -> dict[str, Any]:
        """Captions with female, male and neutral words, before and after, and genders invented."""
        found: dict[str, Any] = {
            name: [sum(has_word(caption, words) for caption in x) for x in (baseline, steered)]
            for name, words in (("female", FEMALE), ("male", MALE))
        }
        found["neutral"] = [sum(map(self.is_target, x)) for x in (baseline, steered)]
        open_ = [n for n, example in enumerate(examples) if not _gender_of(example.answer)]
        found["gender_open"] = len(open_)
        found["invented"] = [sum(self.is_source(x[n]) for n in open_) for x in (baseline, steered)]
        return found


def _gender_of(references: Any) -> str:
    """The gender that more than half of an image's references name; empty where none does."""
    texts = [references] if isinstance(references, str) else list(references or ())
    for name, words, others in (("female", FEMALE, MALE), ("male", MALE, FEMALE)):
        agree = sum(has_word(text, words) and not has_word(text, others) for text in texts)
        if 2 * agree > len(texts):
            return name
    return ""


@steering_task("gender")
def gender(argument: str) -> SteeringTask:
    """`gender`."""
    no_argument("gender", argument)
    return GenderTask()
