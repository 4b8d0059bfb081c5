"""Activation patching: which states carry the difference between two prompts or images.

Axis legend: L layers, B rows, S tokens, T tokens with virtual ones, C columns, D features.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.analysis.capture import OutputProbe, check_site
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.row import Row
from moresjax.data.images import ImageInput
from moresjax.inference.arguments import PromptOptions
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import PromptImages, check_images
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.hooks import AttachedWrite
from moresjax.tuning.sites import num_layers

Question = str | tuple[str, PromptImages] | tuple[str, PromptImages, PromptOptions]


@dataclasses.dataclass(frozen=True)
class Patching:
    """What states of one question do in the pass over another.

    The score of a pass is the logit of the first token of one answer minus that of another, at the
    last token of the prompt.

    Attributes:
      columns: What was patched at a time: tokens as text, `<image 1>` for all visual tokens of an
        image, `<image 1:7>` for one of them.
      scores: The score with the states of a layer and column put in `[L, C]`; L is 1 for a site
        without layers.
      clean: The score of the question that the states are from.
      corrupt: The score of the question that they are put into.
    """

    columns: list[str]
    scores: Float[np.ndarray, "L C"]
    clean: float
    corrupt: float

    @property
    def effect(self) -> Float[np.ndarray, "L C"]:
        """How much of the difference comes back: 0 is the corrupt score, 1 the clean one.

        Raises:
          UserError: The two questions have the same score.
        """
        whole = self.clean - self.corrupt
        if not whole:
            raise UserError("both questions have the same score, of which nothing can come back")
        return (self.scores - self.corrupt) / whole


def patching(
    model: Model,
    clean: Question,
    corrupt: Question,
    answers: tuple[str, str],
    *,
    site: str = "llm.block.out",
    each_visual_token: bool = False,
    batch_size: int = 16,
) -> Patching:
    """Puts states of one question into the pass over another, layer by layer and token by token.

    Two images under one prompt (an image swap) have equally many tokens; so must two prompts.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> images = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    >>> clean, corrupt = (("how many ?", image) for image in images)
    >>> found = patching(talking_model(), clean, corrupt, ("two", "three"))
    >>> found.columns[:2], found.scores.shape
    (['<s>', '<image 1>'], (2, 5))

    Args:
      model: The model.
      clean: The question that the states are from: a prompt, or a prompt and its images, and
        behind them `roi` and `marks` of `Model.generate` as a mapping.
      corrupt: The question that they are put into.
      answers: The two answers whose first tokens are compared.
      site: `llm.embed.out`, `llm.block.out`, `llm.block.attn.out`, `llm.block.mlp.out` or
        `llm.norm.out`.
      each_visual_token: Whether visual tokens are patched one by one; otherwise all tokens of an
        image are at a time.
      batch_size: How many passes are made at a time.

    Raises:
      UserError: As `Model.generate`; the questions have other numbers of tokens or images in other
        places, or the answers begin with the same token.
    """
    check_site(site, model.config)
    if not site.startswith("llm."):
        raise UserError(f"patching is about tokens of the LLM, and {site} has none; see Model.run")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    (text, images, own), (other, others, its) = map(_whole, (clean, corrupt))
    rows = model.prompts.asked(text, images, **own), model.prompts.asked(other, others, **its)
    if len(rows[0]) != len(rows[1]) or ((rows[0].image >= 0) != (rows[1].image >= 0)).any():
        raise UserError(
            f"the questions have {len(rows[0])} and {len(rows[1])} tokens; patching needs as many, "
            "with images in the same places"
        )
    marks, encode = its.get("marks"), model.prompts.with_answer
    firsts = [int(encode(rows[1], other, others, a, marks=marks)[1][0]) for a in answers]
    if firsts[0] == firsts[1]:
        raise UserError(f"answers {answers[0]!r} and {answers[1]!r} begin with the same token")
    columns, masks = _columns(model, rows[1], each_visual_token)
    layers = num_layers(site, model.config) or 1
    wanted = jnp.asarray(firsts, jnp.int32)
    graphdef, state = nnx.split(model.mllm)
    batches = [model.service.batch([row], len(row)) for row in rows]
    with use_mesh(model.mesh):
        (clean_score, value), (corrupt_score, _) = (
            _read(graphdef, site, state, batch, wanted) for batch in batches
        )
        batch = model.service.batch([rows[1]] * batch_size, len(rows[1]))
        cells = [(layer, column) for layer in range(layers) for column in range(len(columns))]
        scores = []
        for start in range(0, len(cells), batch_size):
            own = cells[start : start + batch_size]
            mask = np.zeros((layers, batch_size, masks.shape[1]), bool)
            for place, (layer, column) in enumerate(own):
                mask[layer, place] = masks[column]
            found = _patched(graphdef, site, state, batch, wanted, value, jnp.asarray(mask))
            scores += np.asarray(found)[: len(own)].tolist()
    grid = np.asarray(scores).reshape(layers, len(columns))
    return Patching(columns, grid, float(clean_score[0]), float(corrupt_score[0]))


def _whole(question: Question) -> tuple[str, tuple[ImageInput, ...], PromptOptions]:
    """A question with its images and what is said of regions and marks."""
    if isinstance(question, str):
        return question, (), {}
    text, images, *more = question
    return text, check_images(images), more[0] if more else {}


def _columns(
    model: Model, row: Row, each_visual_token: bool
) -> tuple[list[str], Bool[np.ndarray, "C S"]]:
    """The names of what is patched at a time, and the tokens of each."""
    size, image = model.config.visual_tokens, np.asarray(row.image)
    names: list[str] = []
    for token, number in zip(row.tokens, image.tolist(), strict=True):
        if number < 0:
            names.append(model.prompts.tokenizer.decode([token]))
        else:
            place = f":{number % size}" if each_visual_token else ""
            names.append(f"<image {number // size + 1}{place}>")
    groups: list[list[int]] = []
    for place, name in enumerate(names):
        joins = image[place] >= 0 and not each_visual_token and groups and name == names[place - 1]
        groups[-1].append(place) if joins else groups.append([place])
    masks = np.zeros((len(groups), len(row)), bool)
    for number, places in enumerate(groups):
        masks[number, places] = True
    return [names[places[0]] for places in groups], masks


def _score(model: MLLM, hidden: Float[Array, "B S D"], wanted: Int[Array, "2"]) -> Array:
    logits = model.llm.logits(hidden[:, -1])[:, wanted]
    return logits[:, 0] - logits[:, 1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    graphdef: nnx.GraphDef, site: str, state: nnx.State, batch: Batch, wanted: Int[Array, "2"]
) -> tuple[Float[Array, " B"], Float[Array, "L B T D"]]:
    """The score of a question and the states of all of its tokens."""
    model, probe = nnx.merge(graphdef, state), OutputProbe(site)
    out = model(batch, probes=(probe,))
    return _score(model, out.hidden, wanted), out.stats[probe.name]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _patched(
    graphdef: nnx.GraphDef,
    site: str,
    state: nnx.State,
    batch: Batch,
    wanted: Int[Array, "2"],
    value: Float[Array, "L 1 T D"],
    mask: Bool[Array, "L B S"],
) -> Float[Array, " B"]:
    """The scores of rows into which states are put."""
    model = nnx.merge(graphdef, state)
    # Virtual tokens, which come first, stay what they are.
    mask = jnp.pad(mask, ((0, 0), (0, 0), (value.shape[2] - mask.shape[2], 0)))
    params = {"mask": mask, "value": value}
    if not num_layers(site, model.config):
        params = jax.tree.map(lambda x: x[0], params)
    write = AttachedWrite(lambda p, h: jnp.where(p["mask"][..., None], p["value"], h), params)
    return _score(model, model(batch, writes=((site, write),)).hidden, wanted)
