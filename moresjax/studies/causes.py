"""Which layers hold count, position and identity, and whether MoReS raises the image's effect.

Axis legend: L layers, R ranges of layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moresjax.data.digits import CELL, CELLS, WORDS, Scene, exchange, make_scene
from moresjax.data.samples import IMAGE_MARK
from moresjax.inference.causes import causes
from moresjax.inference.model import Model
from moresjax.inference.pruning import MAPS, faithfulness, visual_attention
from moresjax.inference.questions import ask
from moresjax.reports.plots import lines
from moresjax.studies.findings import PairedDifference, compare_with, listed
from moresjax.studies.llava_steering import MORES, PLAIN, THREE_LAYERS, runs_of
from moresjax.studies.pipeline import Pipeline
from moresjax.studies.study import (
    Outcome,
    Study,
    Table,
    claim,
    values_table,
    with_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTIONS = ("count", "position", "identity")
NAMES = (PLAIN, "full", "lora r=8", MORES)
PAIRS, FAST_PAIRS = 24, 2  # of images for each function
SEED = 7  # draws them
RANDOM = "random"
WHOLE = "all layers"


@dataclasses.dataclass(frozen=True)
class ImagePair:
    """Two images that differ in one thing, a question about it, and what is right for each.

    Attributes:
      question: The question.
      images: Both images.
      answers: The right answer of each.
    """

    question: str
    images: tuple[np.ndarray, np.ndarray]
    answers: tuple[str, str]


def image_pairs(function: str, split: str, count: int) -> list[ImagePair]:
    """Pairs of images for one visual function.

    >>> [pair.answers for pair in image_pairs("identity", "test", 2)]
    [('yes', 'no'), ('no', 'yes')]

    Args:
      function: `count`: a cell has another digit, so that a digit is there once less, or more;
        `position`: two cells have changed places; `identity`: a digit that was there once is
        another one, or the other way round.
      split: The split of the handwriting.
      count: The number of pairs.
    """
    found, number = [], 0
    while len(found) < count:
        rng = np.random.default_rng((SEED, FUNCTIONS.index(function), number))
        number += 1
        pair = _pair(function, make_scene(rng, split), split, rng)
        if pair is not None and len(found) % 2 and function != "position":
            (image, other), (answer, second) = pair.images, pair.answers
            pair = ImagePair(pair.question, (other, image), (second, answer))
        found += [pair] if pair is not None else []
    return found


def _pair(function: str, scene: Scene, split: str, rng: np.random.Generator) -> ImagePair | None:
    """A pair from a scene; None where the scene gives none."""
    first, second = (int(cell) for cell in rng.permutation(4)[:2])
    digits = scene.digits
    if function == "position":
        if digits[first] == digits[second]:
            return None
        image = scene.image.copy()
        for here, there in ((first, second), (second, first)):
            image[_cell(here)] = scene.image[_cell(there)]
        answers = WORDS[digits[first]], WORDS[digits[second]]
        return ImagePair(f"what is at {CELLS[first]} ?", (scene.image, image), answers)
    digit = digits[first]
    others = [d for d in range(10) if d not in digits]
    other = exchange(scene, first, others[rng.integers(len(others))], split, rng)
    images, times = (scene.image, other.image), digits.count(digit)
    if function == "count":
        answers = WORDS[times], WORDS[times - 1]
        return ImagePair(f"how many times {WORDS[digit]} ?", images, answers)
    if times != 1:
        return None
    return ImagePair(f"is there a {WORDS[digit]} ?", images, ("yes", "no"))


def _cell(number: int) -> tuple[slice, slice]:
    y, x = divmod(number, 2)
    return slice(y * CELL, (y + 1) * CELL), slice(x * CELL, (x + 1) * CELL)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one model does.

    Attributes:
      shares: By function, the share of the whole swap's effect that each layer's swap has `[L]`.
      swaps: By function, the effect of swapping all layers, in log-odds of the two answers.
      attention: The attention on the image, mean over layers, of the tokens that predict answers.
      effects: By removal, how much the right answer's log-probability falls without the image.
      faithfulness: By map, insertion minus deletion, mean over questions.
    """

    shares: Mapping[str, list[float]]
    swaps: Mapping[str, float]
    attention: float
    effects: Mapping[str, float]
    faithfulness: Mapping[str, float]


def measure(model: Model, split: str, count: int, seed: int) -> Measured:
    """Measures one model on the same pairs of images as all others.

    Args:
      model: The model.
      split: The split of the handwriting.
      count: The pairs of images for each function.
      seed: Seeds the random maps.
    """
    layers = model.config.llm.num_layers
    ranges = [(0, layers), *((layer, layer + 1) for layer in range(layers))]
    shares, swaps, attention, questions = {}, {}, [], []
    effects: dict[str, list[float]] = {"mean": [], "hide": []}
    for function in FUNCTIONS:
        odds = []
        for pair in image_pairs(function, split, count):
            prompt, (own, other) = f"{IMAGE_MARK}\n{pair.question}", pair.images
            fall = [
                causes(
                    model,
                    prompt,
                    own,
                    answer=answer,
                    removal="swap",
                    other=other,
                    regions="images",
                    layers=ranges,
                    batch_size=len(ranges) + 1,
                ).effects[:, 0]
                for answer in pair.answers
            ]
            odds.append(fall[0] - fall[1])
            questions.append((prompt, own, pair.answers[0]))
        whole, *each = np.mean(odds, axis=0).tolist()
        swaps[function] = whole
        shares[function] = [value / whole if whole else float("nan") for value in each]
    for prompt, image, answer in questions:
        for removal, values in effects.items():
            found = causes(
                model,
                prompt,
                image,
                answer=answer,
                removal=removal,
                regions="images",
                batch_size=len(ranges) + 1,
            )
            values.append(float(found.effects[0, 0]))
        maps = visual_attention(model, ask(model, prompt, image, answer))
        attention.append(float(maps.sum(-1).mean()))
    faithful = faithfulness(model, questions, seed=1000 * seed)
    means = dict(zip(faithful.maps, faithful.values.mean(0).tolist(), strict=True))
    falls = {name: float(np.mean(values)) for name, values in effects.items()}
    return Measured(shares, swaps, float(np.mean(attention)), falls, means)


def _causes(pipeline: Pipeline, study: Study) -> Outcome:
    count = FAST_PAIRS if pipeline.fast else PAIRS
    found: dict[str, list[Measured]] = {run.name: [] for run in study.runs}
    for seed in pipeline.seeds:
        for name, own in found.items():
            own.append(measure(pipeline.model(seed, name), pipeline.split, count, seed))
    attention = {name: [one.attention for one in own] for name, own in found.items()}
    effects = {
        f"without the image ({removal})": {
            name: [one.effects[removal] for one in own] for name, own in found.items()
        }
        for removal in ("mean", "hide")
    }
    mean = effects["without the image (mean)"]
    sentences = [_held(name, own, each) for name, own in found.items() for each in FUNCTIONS]
    sentences += [
        compare_with(PLAIN, "Share of attention on the image", attention),
        compare_with(PLAIN, "Fall of the right answer's log-probability without the image", mean),
    ]
    if MORES in found:
        sentences.append(_raised(attention, mean))
    sentences += [_faithful(name, own) for name, own in found.items()]
    values = {name: [dataclasses.asdict(one) for one in own] for name, own in found.items()}
    columns = {"attention on the image": attention, **effects}
    title = "Attention on the image, and its effect (differences in hundredths)"
    tables = [
        *(_layers_table(function, found) for function in FUNCTIONS),
        values_table(title, columns, PLAIN),
        _maps_table(found),
    ]
    return Outcome(tables, sentences, values, {"shares of a swap by layer": _figure(found)})


def _held(name: str, own: Sequence[Measured], function: str) -> str:
    """Which layers hold a function: those with more than an equal share of the whole swap."""
    layers = len(own[0].shares[function])
    holders = []
    for layer in range(layers):
        values = [one.shares[function][layer] for one in own]
        if PairedDifference.of(values, [1 / layers] * len(values)).direction == "higher":
            holders.append(f"{layer} ({with_interval(values, 2)})")
    what = f"{function[0].upper()}{function[1:]} with {name}"
    if not holders:
        return f"{what}: no layer's share of the swap is shown to be above 1/{layers}."
    word = "layer" if len(holders) == 1 else "layers"
    return f"{what} sits in {word} {listed(holders)}: above 1/{layers} of the whole swap's effect."


def _raised(attention: Mapping[str, list[float]], effect: Mapping[str, list[float]]) -> str:
    """Whether MoReS raises attention on the image and the effect of the image alike."""

    def told(values: Mapping[str, list[float]]) -> str:
        direction = PairedDifference.of(values[MORES], values[PLAIN]).direction
        return direction or "not shown to differ"

    first, second = told(attention), told(effect)
    return (
        f"With {MORES} against {PLAIN}, attention on the image is {first} and the image's effect "
        f"is {second}."
    )


def _faithful(name: str, own: Sequence[Measured]) -> str:
    values = {key: [one.faithfulness[key] for one in own] for key in own[0].faithfulness}
    return compare_with(RANDOM, f"Faithfulness of maps of {name}", values)


def _layers_table(function: str, found: Mapping[str, list[Measured]]) -> Table:
    """The share of every layer's swap."""
    layers = len(next(iter(found.values()))[0].shares[function])
    head = ["method", *(f"layer {layer}" for layer in range(layers)), f"{WHOLE}, log-odds"]
    rows = []
    for name, own in found.items():
        each = [[one.shares[function][layer] for one in own] for layer in range(layers)]
        whole = [one.swaps[function] for one in own]
        rows.append([name, *(with_interval(one, 2) for one in each), with_interval(whole, 2)])
    title = f"{function[0].upper()}{function[1:]}: share of the whole swap's effect by layer"
    return Table(title, head, rows)


def _maps_table(found: Mapping[str, list[Measured]]) -> Table:
    rows = [
        [name, *(with_interval([one.faithfulness[key] for one in own]) for key in MAPS)]
        for name, own in found.items()
    ]
    return Table("Faithfulness of maps: insertion minus deletion", ["method", *MAPS], rows)


def _figure(found: Mapping[str, list[Measured]]) -> "Figure":
    """Each function's shares by layer, mean over seeds, for the run that trains most and MoReS."""
    series = {}
    for name in (name for name in ("full", MORES) if name in found):
        for function in FUNCTIONS:
            shares = np.mean([one.shares[function] for one in found[name]], axis=0).tolist()
            series[f"{function}, {name}"] = (range(len(shares)), shares)
    return lines(series, ("layer", "share of the whole swap's effect"))


STUDIES = (
    Study(
        "causes",
        "Causes: the layers that hold count, position and identity, and the image's effect beside "
        "attention",
        runs_of(*NAMES),
        claim(
            "Visual functions sit in two or three layers (arXiv 2509.24791, by swapping keys and "
            "values of visual tokens); LLaVA Steering says that MoReS raises attention on the "
            "image, and means that answers depend more on it."
        ),
        THREE_LAYERS
        + " An image's keys and values are swapped for those of one that differs in a single "
        "thing; the effect is on the log-odds of both images' right answers.",
        _causes,
        more_minutes=2.0,
    ),
)
