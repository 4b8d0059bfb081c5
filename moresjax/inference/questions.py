"""A question about images with one answer, read once for many interventions.

Axis legend: S tokens, N images, V visual tokens of an image, C columns, R ranges of layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from moresjax.analysis.attention import image_grids
from moresjax.analysis.causes import Reading, SplitModel, read_once
from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import Batch, TokenKind
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.generation.lengths import bucket
from moresjax.inference.arguments import Adapters, PromptOptions
from moresjax.inference.prompt_inputs import PromptImages, check_images
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.base import WeightDelta

if TYPE_CHECKING:
    from moresjax.inference.model import Model

NEW = 16  # new tokens of an answer that is not given
READS = ("question", "answer")
Layers = str | int | Sequence[tuple[int, int]]
Regions = str | Bool[np.ndarray, "C NV"]


@dataclasses.dataclass(frozen=True)
class AskedQuestion:
    """A question with its answer, read once.

    Attributes:
      row: The prompt's tokens.
      ids: The tokens of the answer.
      answer: The answer.
      batch: Prompt and answer as a batch of one row, with images.
      reading: The same with keys and values.
      split: The model that read it.
    """

    row: Row
    ids: Ids
    answer: str
    batch: Batch
    reading: Reading
    split: SplitModel

    @property
    def length(self) -> int:
        """S, the tokens of the padded row."""
        return self.batch.tokens.shape[1]

    @property
    def visual(self) -> Bool[np.ndarray, " S"]:
        """Which tokens are visual."""
        return np.pad(self.row.image >= 0, (0, self.length - len(self.row)))

    @property
    def question(self) -> Bool[np.ndarray, " S"]:
        """Which tokens are the question's, but for the prompt's last one."""
        own = self.row.kind == TokenKind.QUESTION
        own[-1] = False
        return np.pad(own, (0, self.length - len(self.row)))

    @property
    def last(self) -> Bool[np.ndarray, " S"]:
        """The tokens that predict those of the answer, from the prompt's last one on."""
        places = np.arange(self.length) - (len(self.row) - 1)
        return (places >= 0) & (places < len(self.ids))

    def tokens_of(self, visual: Bool[np.ndarray, "*C NV"]) -> Bool[np.ndarray, "*C S"]:
        """Which tokens of the row some of its visual tokens are."""
        found = np.zeros((*visual.shape[:-1], self.length), bool)
        found[..., self.visual] = visual
        return found


def ask(
    model: "Model",
    prompt: str,
    images: PromptImages,
    answer: str | None = None,
    *,
    reads: str = "question",
    adapters: Adapters = None,
    pointing: PromptOptions | None = None,
) -> AskedQuestion:
    """Reads a question about images, with its answer.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      reads: What interventions read again: `question`, all that stands behind the last image, or
        `answer`, the prompt's last token and the answer.
      adapters: The name of the loaded adapter to use.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`; there is no image, nothing stands behind it, or the tuning
        reads all tokens of a row at once.
    """
    if reads not in READS:
        raise choice_error("reads", reads, READS)
    if any(isinstance(m, WeightDelta) and m.sees_tokens for _, m in model.mllm.tuning.methods):
        raise UserError(
            f"tuning {model.tuning} looks at all tokens of a row at once, so that none of them can "
            "be read again by itself"
        )
    own, options = check_images(images), pointing or {}
    if not own:
        raise UserError("causes in an image need an image")
    row = model.prompts.asked(prompt, own, **options)
    if answer is None:
        answer = model.generate(
            prompt, own, max_new_tokens=NEW, adapters=adapters, details=False, **options
        )
        if not answer:
            raise UserError("the model says nothing; give the answer to explain")
    row, ids = model.prompts.with_answer(row, prompt, own, answer, marks=options.get("marks"))
    model.service.check_answer(row, ids)
    first = int(np.flatnonzero(row.image >= 0)[-1]) + 1 if reads == "question" else len(row) - 1
    if first > len(row) - 1 or row.image[-1] >= 0:
        raise UserError("no token of the prompt stands behind its last image")
    whole = row.append(ids[:-1])
    length = first + bucket(len(whole) - first, 8)
    batch = model.service.batch([whole], length, model.adapter_names(adapters, 1))
    width = bucket(len(ids), 4)
    queries = np.minimum(len(row) - 1 + np.arange(width), len(whole) - 1).astype(np.int32)
    targets, weights = np.zeros(width, np.int32), np.zeros(width, np.float32)
    targets[: len(ids)], weights[: len(ids)] = ids, 1
    model.mllm.llm.unstack()
    split = SplitModel.of(model.mllm)
    with use_mesh(model.mesh):
        reading = read_once(split, batch, first, queries, targets, weights)
    return AskedQuestion(row, ids, answer, batch, reading, split)


def layer_ranges(layers: Layers, count: int) -> list[tuple[int, int]]:
    """Ranges of layers: first layer and the one behind the last.

    >>> layer_ranges("each", 2), layer_ranges(2, 3), layer_ranges("all", 4)
    ([(0, 1), (1, 2)], [(0, 2), (1, 3)], [(0, 4)])

    Args:
      layers: `all`, `each`, the width of a window that slides over the layers, or the ranges.
      count: The number of layers.

    Raises:
      UserError: It is none of these, or a range is empty or no part of the layers.
    """
    if layers == "all":
        return [(0, count)]
    if layers == "each":
        return layer_ranges(1, count)
    if isinstance(layers, str):
        if not layers.isdigit():
            raise UserError(f"layers must be all, each or the width of a window, got {layers!r}")
        layers = int(layers)
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise UserError(f"a window must have 1 to {count} layers, got {layers}")
        return [(start, start + layers) for start in range(count - layers + 1)]
    ranges = [(int(first), int(end)) for first, end in layers]
    for first, end in ranges:
        if not 0 <= first < end <= count:
            raise UserError(f"layers {first} to {end - 1} are no part of the {count} layers")
    if not ranges:
        raise UserError("there is no range of layers")
    return ranges


def layer_masks(ranges: Sequence[tuple[int, int]], count: int) -> Bool[np.ndarray, "R L"]:
    """Which layers each range has."""
    numbers = np.arange(count)
    return np.stack([(numbers >= first) & (numbers < end) for first, end in ranges])


def visual_regions(
    model: "Model", row: Row, regions: Regions
) -> tuple[list[str], Bool[np.ndarray, "C NV"]]:
    """Names and visual tokens of regions of a prompt's images.

    Args:
      model: The model.
      row: The prompt.
      regions: `tokens`, each visual token; `images`, each image; `RxC`, each of R rows of C cells
        of each image; `roi`, the regions of interest and the rest; or the tokens themselves.

    Raises:
      UserError: It is none of these, the connector's tokens have no places, or nobody told the
        regions of interest.
    """
    count, size = row.num_images, model.config.visual_tokens
    if not isinstance(regions, str):
        masks = np.asarray(regions)
        if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != count * size:
            raise UserError(
                f"regions must be a bool array [regions, {count * size}], got "
                f"{masks.dtype}{list(masks.shape)}"
            )
        return [f"<region {number + 1}>" for number in range(len(masks))], masks
    if regions == "tokens":
        numbers = range(count * size)
        names = [f"<image {n // size + 1}:{n % size}>" for n in numbers]
        return names, np.eye(count * size, dtype=bool)
    if regions == "images":
        names = [f"<image {number + 1}>" for number in range(count)]
        return names, np.repeat(np.eye(count, dtype=bool), size, axis=1)
    if regions == "roi":
        if row.roi is None:
            raise UserError("regions roi need to be told the region (roi)")
        inside = np.asarray(row.roi).reshape(-1)
        return ["<roi>", "<rest>"], np.stack([inside, ~inside])
    return _cells(model, count, regions)


def _cells(model: "Model", images: int, regions: str) -> tuple[list[str], Bool[np.ndarray, "C NV"]]:
    rows, _, columns = regions.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise UserError(f"regions must be tokens, images, roi or ROWSxCOLUMNS, got {regions!r}")
    centres = model.config.visual_token_centres()
    if centres is None:
        raise UserError(f"tokens of connector {model.config.connector} have no places on the image")
    counts = int(columns), int(rows)
    cells = np.floor(np.nan_to_num(centres, nan=-1.0) * counts)
    names, masks = [], []
    for image in range(images):
        for y in range(counts[1]):
            for x in range(counts[0]):
                mask = np.zeros((images, len(cells)), bool)
                mask[image] = (cells == (x, y)).all(1)
                names.append(f"<image {image + 1} row {y} column {x}>")
                masks.append(mask.reshape(-1))
    return names, np.stack(masks)


def region_grids(
    model: "Model", row: Row, values: Float[np.ndarray, "R C"], masks: Bool[np.ndarray, "C NV"]
) -> Any:
    """Values of regions on the patches of the images `[N, R, Y, X]`; nan where there is none.

    Returns:
      The grids; of no images where the connector's tokens have no places.
    """
    each = np.full((len(values), masks.shape[1]), np.nan)
    for column, mask in enumerate(masks):
        each[:, mask] = values[:, column, None]
    try:
        return image_grids(each, row.num_images, model.config)
    except UserError:  # learned queries have no place on the image
        return np.zeros((0, len(values), 0, 0))
