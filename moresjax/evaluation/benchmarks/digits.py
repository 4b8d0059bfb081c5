"""The built-in benchmark: questions about scenes of handwritten digits, one task per family."""

from collections import Counter

import numpy as np

from moresjax.data.digits import FAMILIES, ask, make_scene
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.examples import Item
from moresjax.evaluation.scoring import by_item
from moresjax.evaluation.tasks import VisualTask, benchmark

DEFAULT_LIMIT = 300  # scenes; every scene is asked one question of every family
SEED = 0  # of the scenes


def items(split: str, scenes: int, seed: int = SEED) -> dict[str, list[Item]]:
    """Questions by family about the same scenes of a split's handwriting."""
    found = {family: [] for family in FAMILIES}
    for number in range(scenes):
        # The evaluation's scenes have their own seed sequence: no training scene repeats here.
        rng = np.random.default_rng((seed, number, 1))
        scene = make_scene(rng, split)
        for family in FAMILIES:
            turn = ask(family, scene.digits, rng)
            prompt = f"{IMAGE_MARK}\n{turn.question}"
            found[family].append(
                Item(f"{family}-{split}-{number}", prompt, turn.answer, (scene.image,))
            )
    return found


def majority(questions: list[Item]) -> float:
    """Accuracy of always giving the most frequent answer."""
    return Counter(item.answer for item in questions).most_common(1)[0][1] / len(questions)


@benchmark("digits")
def load(data_root=None, limit: int | None = None, split: str = "test") -> list[VisualTask]:
    """One task per question family."""
    by_family = items(split, limit or DEFAULT_LIMIT)
    score = by_item(details=lambda *_: {"seed": SEED})
    return [
        VisualTask(f"digits_{family}", questions, max_new_tokens=2, score=score)
        for family, questions in by_family.items()
    ]
