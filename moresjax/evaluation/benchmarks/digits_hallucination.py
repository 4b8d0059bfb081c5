"""POPE and HallusionBench of the digits world, scored by the rules of the originals.

`digits_pope` asks whether a digit is in the scene, as often about digits that are there as about
others, which are chosen in three ways. `digits_hallusion` asks the same questions about a scene and
about the same scene with one digit exchanged, which turns every answer round.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from moresjax.core.errors import choice_error
from moresjax.data.digits import (
    CELLS,
    SPLITS,
    WORDS,
    Scene,
    exchange,
    load_instances,
    make_scene,
)
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.benchmarks.digits import DEFAULT_LIMIT, SEED
from moresjax.evaluation.benchmarks.pope import KINDS, details, is_right
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import DataRoot
from moresjax.evaluation.metrics.hallusionbench import (
    CORRECT,
    INCORRECT,
    hallusionbench_summary,
)
from moresjax.evaluation.scoring import Predictions, example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark


def _scenes(split: str, limit: int | None, kind: int) -> list[tuple[Scene, np.random.Generator]]:
    """Scenes of a benchmark, each with the numbers that choose its questions."""
    if split not in SPLITS:
        raise choice_error("split", split, SPLITS)
    seeds = [(SEED, number, kind) for number in range(limit or DEFAULT_LIMIT)]
    found = [np.random.default_rng(seed) for seed in seeds]
    return [(make_scene(rng, split), rng) for rng in found]


@functools.cache
def look_alikes() -> np.ndarray:
    """Mean distance in pixels between the training handwriting of every two digits `[10, 10]`."""
    images, labels = load_instances()["train"]
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)])
    return np.sqrt(((means[:, None] - means[None]) ** 2).mean((-1, -2)))


def _absent(kind: str, scene: Scene, frequent: Sequence[int], rng: np.random.Generator) -> list:
    """Digits that are not in a scene, the first to ask about first."""
    absent = [digit for digit in range(10) if digit not in scene.digits]
    if kind == "random":
        return [absent[n] for n in rng.permutation(len(absent))]
    if kind == "popular":
        return [digit for digit in frequent if digit in absent]
    distance = look_alikes()[:, list(scene.digits)].min(1)
    return sorted(absent, key=lambda digit: distance[digit])


@benchmark("digits_pope")
def load_pope(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy, precision, recall and F1 by what the absent digits are.

    `random` ones, `popular` ones, which are most frequent in the scenes, and `adversarial` ones,
    whose handwriting looks most like that of a digit in the scene (POPE takes objects that often
    come together, but these digits are independent).
    """
    scenes = _scenes(split, limit, 3)
    counts = Counter(digit for scene, _ in scenes for digit in set(scene.digits))
    frequent = [digit for digit, _ in counts.most_common()]
    found: dict[str, list[Example]] = {kind: [] for kind in KINDS}
    for number, (scene, rng) in enumerate(scenes):
        present = [int(digit) for digit in rng.permutation(sorted(set(scene.digits)))][:3]
        for kind in KINDS:
            others = _absent(kind, scene, frequent, rng)[: len(present)]
            asked = [*((d, "yes") for d in present), *((d, "no") for d in others)]
            for place, (digit, answer) in enumerate(asked):
                prompt = f"{IMAGE_MARK}\nis there a {WORDS[digit]} ?"
                name = f"{kind}-{split}-{number}-{place}"
                found[kind].append(Example(name, prompt, answer, (scene.image,)))
    scorer = example_scorer(is_right, details)
    return [
        BenchmarkTask(f"digits_pope_{kind}", own, max_new_tokens=2, scorer=scorer)
        for kind, own in found.items()
    ]


def _summary(
    examples: Sequence[Example], predictions: Predictions, scores: Sequence[float]
) -> dict[str, float]:
    verdicts = [CORRECT if score else INCORRECT for score in scores]
    return hallusionbench_summary([example.metadata for example in examples], verdicts)


@benchmark("digits_hallusion")
def load_hallusion(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """HallusionBench's percentages: per question, per figure, per pair, and on altered figures.

    All questions are of its kind "visual dependent".
    """
    examples = []
    for number, (first, rng) in enumerate(_scenes(split, limit, 4)):
        scene, cell, other, new = _pair(first, split, rng)
        old, beside = scene.digits[cell], scene.digits[other]
        edited = exchange(scene, cell, new, split, rng)
        questions = {
            f"is there a {WORDS[old]} ?": (True, False),
            f"is there a {WORDS[new]} ?": (False, True),
            f"is {CELLS[cell]} larger than {CELLS[other]} ?": (old > beside, new > beside),
        }
        for figure, shown in enumerate((scene, edited)):
            for place, (question, answers) in enumerate(questions.items()):
                row = {
                    "category": "VD",
                    "subcategory": "digits",
                    "set_id": str(number),
                    "figure_id": str(figure),
                    "question_id": str(place),
                    "visual_input": str(1 + figure),
                    "gt_answer": str(int(answers[figure])),
                }
                name, prompt = f"{split}-{number}-{figure}-{place}", f"{IMAGE_MARK}\n{question}"
                answer = "yes" if answers[figure] else "no"
                examples.append(Example(name, prompt, answer, (shown.image,), metadata=row))
    scorer = example_scorer(is_right, _summary, name="aAcc")
    return [BenchmarkTask("digits_hallusion", examples, max_new_tokens=2, scorer=scorer)]


def _pair(scene: Scene, split: str, rng: np.random.Generator) -> tuple[Scene, int, int, int]:
    """A scene, a cell whose digit comes once, another cell, and a new digit for the first.

    The other cell's digit lies between the old digit and the new one, which is not in the scene.
    """
    while True:
        digits = scene.digits
        found = [
            (cell, other, new)
            for cell in range(4)
            for other in range(4)
            for new in range(10)
            if digits.count(digits[cell]) == 1
            and new not in digits
            and (digits[cell] - digits[other]) * (new - digits[other]) < 0
        ]
        if found:
            return (scene, *found[rng.integers(len(found))])
        scene = make_scene(rng, split)
