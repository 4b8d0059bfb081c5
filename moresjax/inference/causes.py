"""What an answer owes to visual tokens, and to what question and answer read from them.

Axis legend: R ranges of layers, C columns, E edges, N images, Y, X patches of an image, S tokens.
"""

import dataclasses
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
from jaxtyping import Bool, Float

from moresjax.analysis.causes import REMOVALS, Interventions, answer_scores, replacements
from moresjax.core.errors import UserError, choice_error
from moresjax.inference.arguments import Adapters, Marks, PromptOptions, Roi
from moresjax.inference.prompt_inputs import PromptImages, check_images
from moresjax.inference.questions import (
    AskedQuestion,
    Layers,
    Regions,
    ask,
    layer_masks,
    layer_ranges,
    region_grids,
    visual_regions,
)
from moresjax.sharding.mesh import use_mesh

if TYPE_CHECKING:
    from moresjax.inference.model import Model

# Whose keys and values are hidden from whom, and in what order.
EDGES = ("image -> question", "image -> last", "question -> last")


@dataclasses.dataclass(frozen=True)
class Causes:
    """The effects of what was taken away from an answer.

    Attributes:
      answer: The answer.
      value: Its log-probability when nothing is taken away.
      columns: What was taken away at a time: `<image 1:7>` is a visual token, `<image 1>` all of
        an image.
      layers: The ranges of layers: the first layer and the one behind the last.
      effects: How much the log-probability falls `[R, C]`; negative where it rises.
      kept: Whether each token of the answer is still the likeliest one `[R, C]`.
      grids: The effects on each image's patches `[N, R, Y, X]`; nan where a patch has no token,
        empty where tokens have no place on the image.
    """

    answer: str
    value: float
    columns: list[str]
    layers: list[tuple[int, int]]
    effects: Float[np.ndarray, "R C"]
    kept: Bool[np.ndarray, "R C"]
    grids: Float[np.ndarray, "N R Y X"]


@dataclasses.dataclass(frozen=True)
class Knockouts:
    """The effects of attention that was knocked out.

    Attributes:
      answer: The answer.
      value: Its log-probability when nothing is knocked out.
      edges: Who no longer reads whom.
      layers: The ranges of layers: the first layer and the one behind the last.
      effects: How much the log-probability falls `[E, R]`.
      kept: Whether each token of the answer is still the likeliest one `[E, R]`.
    """

    answer: str
    value: float
    edges: tuple[str, ...]
    layers: list[tuple[int, int]]
    effects: Float[np.ndarray, "E R"]
    kept: Bool[np.ndarray, "E R"]


class CausesOptions(TypedDict, total=False):
    """Keyword arguments of `causes`, which documents them."""

    answer: str | None
    removal: str
    other: PromptImages
    regions: Regions
    layers: Layers
    reads: str
    seed: int
    adapters: Adapters
    batch_size: int
    roi: Roi
    marks: Marks


def causes(
    model: "Model",
    prompt: str,
    images: PromptImages,
    *,
    answer: str | None = None,
    removal: str = "mean",
    other: PromptImages = (),
    regions: Regions = "tokens",
    layers: Layers = "all",
    reads: str = "question",
    seed: int = 0,
    adapters: Adapters = None,
    batch_size: int = 32,
    **pointing: Unpack[PromptOptions],
) -> Causes:
    """The effect on an answer of removing visual tokens or regions, layer range by layer range.

    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = causes(talking_model(), "how many ?", image, answer="two", layers="each")
    >>> found.effects.shape, found.grids.shape  # 2 layers, 9 visual tokens on 3 x 3 patches
    ((2, 9), (1, 2, 3, 3))

    What is edited, exactly: the prompt and its answer are read once. Then the keys and values of a
    region's tokens, in the layers of a range, are replaced in that pass's cache, and what stands
    behind the last image, question and answer, is read again on it. System prompt and visual
    tokens are not read again: what they took over from a removed token stays. With `reads="answer"`
    the question is not read again either, but for the prompt's last token: then the effect is what
    the answer itself reads from the image.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      removal: What stands in the place of keys and values: `mean` of the prompt's visual tokens (of
        keys before rotation, turned to their place), `zero`, `noise` with the visual tokens' mean
        and standard deviation, `swap`, those of the images `other`; or `hide`, which takes tokens
        out of the softmax.
      other: For `swap`, as many other images.
      regions: `tokens`, each visual token; `images`, each image; `2x3`, each cell of two rows and
        three columns of each image; `roi`, the regions of interest and the rest; or a bool array of
        visual tokens `[C, N * V]`.
      layers: `all` at a time; `each` by itself; the width of a window that slides over the layers;
        or ranges (first, behind the last).
      reads: `question` or `answer`, see above.
      seed: Seeds the noise.
      adapters: The name of the loaded adapter to use.
      batch_size: How many interventions are made at a time.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`; there is no image, an option has no such value, the other
        images have other places, or the tuning reads all tokens of a row at once.
    """
    _check(removal, batch_size)
    if (removal == "swap") != bool(check_images(other, "other")):
        raise UserError("other images go with the removal swap, which needs them")
    count = model.config.llm.num_layers
    ranges = layer_ranges(layers, count)
    options = {"reads": reads, "adapters": adapters, "pointing": pointing}
    asked = ask(model, prompt, images, answer, **options)
    names, masks = visual_regions(model, asked.row, regions)
    swapped = None
    if removal == "swap":
        swapped = ask(model, prompt, other, asked.answer, **options)
        if not np.array_equal(asked.row.image, swapped.row.image):
            raise UserError("the other images have other places in the prompt than the images")
    with use_mesh(model.mesh):
        values = replacements(
            asked.split,
            asked.reading,
            removal,
            asked.visual,
            other=swapped and swapped.reading,
            seed=seed,
        )
        each = Interventions(
            np.repeat(layer_masks(ranges, count), len(masks), axis=0),
            np.tile(asked.tokens_of(masks), (len(ranges), 1)),
        )
        scores, greedy = answer_scores(
            asked.split, asked.reading, each.behind_nothing(), values, batch_size
        )
    shape = (len(ranges), len(masks))
    effects, kept = (scores[0] - scores[1:]).reshape(shape), greedy[1:].reshape(shape)
    grids = region_grids(model, asked.row, effects, masks)
    return Causes(asked.answer, float(scores[0]), names, ranges, effects, kept, grids)


def knockouts(
    model: "Model",
    prompt: str,
    images: PromptImages,
    *,
    answer: str | None = None,
    layers: Layers = 1,
    adapters: Adapters = None,
    batch_size: int = 32,
    **pointing: Unpack[PromptOptions],
) -> Knockouts:
    """The effect on an answer of attention that is knocked out, window of layers by window.

    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = knockouts(talking_model(), "how many ?", image, answer="two")
    >>> found.edges[0], found.effects.shape
    ('image -> question', (3, 2))

    In the layers of a window, question tokens do not see the image (`image -> question`), or the
    tokens that predict the answer's (the prompt's last one, and those of the answer) do not see
    the image (`image -> last`) or the question (`question -> last`). Hidden keys are out of the
    softmax. Question tokens before the image, which cannot see it, count as question.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      layers: `all`, `each`, the width of a sliding window, or ranges, as `causes` takes them.
      adapters: The name of the loaded adapter to use.
      batch_size: How many interventions are made at a time.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `causes`.
    """
    _check("hide", batch_size)
    count = model.config.llm.num_layers
    ranges = layer_ranges(layers, count)
    asked = ask(model, prompt, images, answer, adapters=adapters, pointing=pointing)
    keys, readers = _edges(asked)
    each = Interventions(
        np.tile(layer_masks(ranges, count), (len(EDGES), 1)),
        np.repeat(keys, len(ranges), axis=0),
        np.repeat(readers, len(ranges), axis=0),
    )
    with use_mesh(model.mesh):
        scores, greedy = answer_scores(
            asked.split, asked.reading, each.behind_nothing(), batch_size=batch_size
        )
    shape = (len(EDGES), len(ranges))
    effects, kept = (scores[0] - scores[1:]).reshape(shape), greedy[1:].reshape(shape)
    return Knockouts(asked.answer, float(scores[0]), EDGES, ranges, effects, kept)


def _edges(asked: AskedQuestion) -> tuple[Bool[np.ndarray, "E S"], Bool[np.ndarray, "E S"]]:
    """The hidden keys and the readers of every edge."""
    keys = np.stack([asked.visual, asked.visual, asked.question])
    return keys, np.stack([asked.question, asked.last, asked.last])


def _check(removal: str, batch_size: int) -> None:
    if removal not in REMOVALS:
        raise choice_error("removal", removal, REMOVALS)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
