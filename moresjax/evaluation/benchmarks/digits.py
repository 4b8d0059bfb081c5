"""The built-in benchmarks: questions about scenes of handwritten digits, one task per family.

`digits` shows a scene; `digits_text` describes it in words, as the text stage does.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moresjax.core.errors import choice_error
from moresjax.data.digits import (
    FAMILIES,
    SPLITS,
    UNSEEN,
    ask,
    describe,
    make_scene,
    random_digits,
)
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import DataRoot
from moresjax.evaluation.scoring import example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

DEFAULT_LIMIT = 300  # scenes
SEED = 0  # draws the scenes


def make_examples(split: str, scenes: int, seed: int = SEED) -> dict[str, list[Example]]:
    """Questions by family about the same scenes of a split's handwriting.

    Args:
      split: `train`, `val` or `test`.
      scenes: The number of scenes; every scene is asked one question of every family.
      seed: Seeds the scenes.
    """
    found = {family: [] for family in FAMILIES}
    for number in range(scenes):
        # The evaluation's scenes have their own seed sequence: no training scene repeats here.
        rng = np.random.default_rng((seed, number, 1))
        scene = make_scene(rng, split)
        for family in FAMILIES:
            turn = ask(family, scene.digits, rng)
            prompt = f"{IMAGE_MARK}\n{turn.question}"
            found[family].append(
                Example(f"{family}-{split}-{number}", prompt, turn.answer, (scene.image,))
            )
    return found


def majority_accuracy(questions: Sequence[Example]) -> float:
    """The accuracy of always giving the most frequent answer."""
    return Counter(example.answer for example in questions).most_common(1)[0][1] / len(questions)


@benchmark("digits")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """One task per question family."""
    by_family = make_examples(split, limit or DEFAULT_LIMIT)
    scorer = example_scorer(details=lambda *_: {"seed": SEED})
    return [
        BenchmarkTask(f"digits_{family}", questions, max_new_tokens=2, scorer=scorer)
        for family, questions in by_family.items()
    ]


@benchmark("digits_text")
def load_text(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """One task per question family of the text stage, about scenes that are described in words."""
    if split not in SPLITS:
        raise choice_error("split", split, SPLITS)
    families = [family for family in FAMILIES if family != UNSEEN]
    found: dict[str, list[Example]] = {family: [] for family in families}
    for number in range(limit or DEFAULT_LIMIT):
        rng = np.random.default_rng((SEED, number, 2, list(SPLITS).index(split)))
        digits = random_digits(rng)
        for family in families:
            turn = ask(family, digits, rng)
            prompt = f"{describe(digits, rng)}\n{turn.question}"
            found[family].append(Example(f"{family}-text-{split}-{number}", prompt, turn.answer))
    scorer = example_scorer(details=lambda *_: {"seed": SEED})
    return [
        BenchmarkTask(f"digits_text_{family}", own, max_new_tokens=2, scorer=scorer)
        for family, own in found.items()
    ]
