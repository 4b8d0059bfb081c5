"""Which visual tokens an answer needs: pruning curves, and how faithful maps of the image are.

Axis legend: M maps, P shares of tokens, N images, V visual tokens of an image, W questions,
L layers, G tokens of the answer, Q places for them, T tokens with virtual ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.analysis.attention import AttentionMaps
from moresjax.analysis.attribution import embedding_gradients, token_scores
from moresjax.analysis.causes import Interventions, Structure, answer_scores
from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import Batch
from moresjax.inference.arguments import Adapters, PromptOptions
from moresjax.inference.prompt_inputs import PromptImages
from moresjax.inference.questions import AskedQuestion, ask
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import use_mesh

if TYPE_CHECKING:
    from moresjax.inference.model import Model

MAPS = ("attention", "fastv", "gradient", "effect", "random")
SHARES = tuple(np.linspace(0, 1, 11).tolist())
FASTV_LAYERS = 2  # K: layers that see all tokens
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class PruningCurves:
    """How well an answer is kept when some of the visual tokens are hidden.

    Attributes:
      answer: The answer.
      num_tokens: The number of its tokens.
      value: Its log-probability with all visual tokens.
      maps: The names of the orders of visual tokens.
      scores: What each map gives every visual token `[M, N * V]`; the highest come first.
      shares: Shares of the visual tokens, from 0 to 1 `[P]`.
      inserted: The log-probability when only the first of a map's tokens are seen `[M, P]`.
      deleted: The same when these are hidden and the others are seen `[M, P]`.
      kept: Whether each token of the answer is the likeliest one where `inserted` `[M, P]`.
    """

    answer: str
    num_tokens: int
    value: float
    maps: tuple[str, ...]
    scores: Float[np.ndarray, "M NV"]
    shares: Float[np.ndarray, " P"]
    inserted: Float[np.ndarray, "M P"]
    deleted: Float[np.ndarray, "M P"]
    kept: Bool[np.ndarray, "M P"]

    @property
    def insertion(self) -> Float[np.ndarray, " M"]:
        """The area under the insertion curve: of the probability per token of the answer."""
        return self._area(self.inserted)

    @property
    def deletion(self) -> Float[np.ndarray, " M"]:
        """The area under the deletion curve; a faithful map has a small one."""
        return self._area(self.deleted)

    @property
    def faithfulness(self) -> Float[np.ndarray, " M"]:
        """Insertion minus deletion, from -1 to 1; a random map has 0 in the mean."""
        return self.insertion - self.deletion

    def _area(self, logprobs: Float[np.ndarray, "M P"]) -> Float[np.ndarray, " M"]:
        return np.trapezoid(np.exp(logprobs / self.num_tokens), self.shares, axis=1)


@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """How faithful maps are to what answers depend on, over several questions.

    Attributes:
      maps: The names of the maps.
      values: Insertion minus deletion of every question and map `[W, M]`.
      curves: The curves of every question.
    """

    maps: tuple[str, ...]
    values: Float[np.ndarray, "W M"]
    curves: list[PruningCurves]

    def interval(self, name: str, against: str | None = None) -> tuple[float, float, float]:
        """The mean over questions with its 95% interval, by resampling questions.

        Args:
          name: A map.
          against: Another one, from whose value on the same question it differs.
        """
        own = self.values[:, self.maps.index(name)]
        if against is not None:
            own = own - self.values[:, self.maps.index(against)]
        draws = np.random.default_rng(0).integers(0, len(own), (RESAMPLES, len(own)))
        low, high = np.quantile(own[draws].mean(1), (0.025, 0.975))
        return float(own.mean()), float(low), float(high)


def faithfulness(
    model: "Model",
    questions: Sequence[tuple[str, PromptImages] | tuple[str, PromptImages, str]],
    *,
    maps: Sequence[str] = MAPS,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    adapters: Adapters = None,
    batch_size: int = 32,
) -> Faithfulness:
    """Compares maps of the image by what happens to answers when tokens are taken in their order.

    >>> from moresjax.testing import talking_model
    >>> images = np.zeros((2, 12, 12, 3), np.uint8)
    >>> questions = [("how many ?", image, "two") for image in images]
    >>> found = faithfulness(talking_model(), questions, maps=("attention", "random"))
    >>> found.values.shape, len(found.interval("attention", against="random"))
    ((2, 2), 3)

    Args:
      model: The model.
      questions: Prompts with their images, and with their answers; default: the model's own.
      maps: The names of the maps, as `pruning` takes them.
      shares: The shares of visual tokens.
      seed: Seeds the random maps, each question's own.
      adapters: The name of the loaded adapter to use.
      batch_size: How many interventions are made at a time.

    Raises:
      UserError: As `pruning`; there is no question.
    """
    if not questions:
        raise UserError("faithfulness needs at least one question")
    curves = []
    for number, (prompt, images, *answer) in enumerate(questions):
        options = {"maps": maps, "shares": shares, "adapters": adapters, "batch_size": batch_size}
        own = answer[0] if answer else None
        curves.append(pruning(model, prompt, images, answer=own, seed=seed + number, **options))
    return Faithfulness(tuple(maps), np.stack([each.faithfulness for each in curves]), curves)


def pruning(
    model: "Model",
    prompt: str,
    images: PromptImages,
    *,
    answer: str | None = None,
    maps: Sequence[str] = MAPS,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    adapters: Adapters = None,
    batch_size: int = 32,
    **pointing: Unpack[PromptOptions],
) -> PruningCurves:
    """How well an answer is kept against the share of visual tokens that are seen.

    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = pruning(talking_model(), "how many ?", image, answer="two", shares=(0, 0.5, 1))
    >>> found.inserted.shape, bool(abs(found.inserted[:, -1] - found.value).max() < 1e-4)
    ((5, 3), True)

    Hidden tokens are out of the softmax of all that stands behind the last image, as in
    `causes(removal="hide")`; positions stay what they are.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      maps: What visual tokens are ordered by: `attention` of the tokens that predict the answer's
        (mean over layers, heads and tokens); `fastv`, attention of the prompt's last token in the
        second layer, where tokens are hidden behind that layer only (FastV's rule,
        arXiv 2403.06764); `gradient`, the embedding times the derivative of the answer's
        log-probability; `effect`, that of hiding the token alone; `random`.
      shares: The shares of visual tokens, rising from 0 to 1.
      seed: Seeds the random map.
      adapters: The name of the loaded adapter to use.
      batch_size: How many interventions are made at a time.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `causes`; there is no such map, or shares do not rise from 0 to 1.
    """
    for name in maps:
        if name not in MAPS:
            raise choice_error("map", name, MAPS)
    steps = np.asarray(shares, float)
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != 1 or (np.diff(steps) <= 0).any():
        raise UserError(f"shares must rise from 0 to 1, got {list(shares)}")
    if batch_size < 1 or not maps:
        raise UserError("pruning needs a map and a batch_size of at least 1")
    asked = ask(model, prompt, images, answer, adapters=adapters, pointing=pointing)
    with use_mesh(model.mesh):
        attention = functools.cache(lambda: visual_attention(model, asked))  # two maps read it
        scores = np.stack([_map(model, asked, name, attention, seed, batch_size) for name in maps])
        masks = _first_tokens(scores, steps)  # [M, P, NV]
        layers = np.stack([_layers(model, name) for name in maps])
        acts = np.repeat(np.concatenate([layers, layers]), len(steps), axis=0)
        hidden = np.concatenate([~masks, masks]).reshape(-1, scores.shape[1])
        found, greedy = _hidden(model, asked, hidden, acts, batch_size)
    shape = (2, len(maps), len(steps))
    inserted, deleted = found[1:].reshape(shape)
    kept = greedy[1:].reshape(shape)[0]
    facts = (asked.answer, len(asked.ids), float(found[0]), tuple(maps), scores, steps)
    return PruningCurves(*facts, inserted, deleted, kept)


def _first_tokens(
    scores: Float[np.ndarray, "M NV"], shares: Float[np.ndarray, " P"]
) -> Bool[np.ndarray, "M P NV"]:
    """The tokens with the highest scores, as many as each share says."""
    order: Int[np.ndarray, "M NV"] = np.argsort(-scores, axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    counts = np.round(shares * scores.shape[1])
    return rank[:, None, :] < counts[None, :, None]


def _layers(model: "Model", name: str) -> Bool[np.ndarray, " L"]:
    """The layers in which the tokens of a map are hidden."""
    numbers = np.arange(model.config.llm.num_layers)
    return numbers >= (FASTV_LAYERS if name == "fastv" else 0)


def _hidden(
    model: "Model",
    asked: AskedQuestion,
    visual: Bool[np.ndarray, "I NV"],
    layers: Bool[np.ndarray, "I L"],
    batch_size: int,
) -> tuple[Float[np.ndarray, " J"], Bool[np.ndarray, " J"]]:
    """The answer without some visual tokens, behind the untouched one: J = I + 1."""
    each = Interventions(layers, asked.tokens_of(visual))
    return answer_scores(asked.split, asked.reading, each.behind_nothing(), batch_size=batch_size)


def _map(
    model: "Model",
    asked: AskedQuestion,
    name: str,
    attention: Callable[[], Float[np.ndarray, "L G NV"]],
    seed: int,
    batch_size: int,
) -> Float[np.ndarray, " NV"]:
    """The score of every visual token."""
    count = int(asked.visual.sum())
    if name == "random":
        return np.random.default_rng(seed).random(count)
    if name == "effect":
        each = np.eye(count, dtype=bool)
        layers = np.ones((count, model.config.llm.num_layers), bool)
        scores, _ = _hidden(model, asked, each, layers, batch_size)
        return (scores[0] - scores[1:]).astype(float)
    reading = asked.reading
    queries, targets, weights = (
        np.asarray(x)[None] for x in (reading.queries, reading.targets, reading.weights)
    )
    if name == "gradient":
        _, embedded, gradient = embedding_gradients(
            model.mllm, asked.batch, queries, targets, weights
        )
        return token_scores(embedded[0], gradient[0], "input_x_gradient")[asked.visual].astype(
            float
        )
    if name == "fastv":
        return attention()[:FASTV_LAYERS][-1, 0].astype(float)
    return attention().mean((0, 1)).astype(float)


def visual_attention(model: "Model", asked: AskedQuestion) -> Float[np.ndarray, "L G NV"]:
    """The attention on visual tokens of the tokens that predict the answer's, mean over heads."""
    columns = np.flatnonzero(asked.visual) + model.mllm.tuning.num_virtual_tokens
    split = asked.split
    maps = _attention(
        split.structure, split.state, asked.batch, jnp.asarray(asked.reading.queries)[None]
    )
    return np.asarray(maps)[:, : len(asked.ids), columns]


@functools.partial(jax.jit, static_argnums=0)
def _attention(
    structure: Structure, state: nnx.State, batch: Batch, queries: Int[Array, "1 Q"]
) -> Float[Array, "L Q T"]:
    model: MLLM = nnx.merge(structure.graphdef, state)
    return model(batch, probes=(AttentionMaps(),), queries=queries).stats["maps"][:, 0]
