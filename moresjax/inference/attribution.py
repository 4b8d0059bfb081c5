"""Where an answer comes from: the model's parts, and the tokens and patches of the prompt.

Axis legend: S tokens, N images, Y, X patches of an image.
"""

import dataclasses
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float

from moresjax.analysis.attention import image_grids
from moresjax.analysis.attribution import (
    METHODS,
    LogitParts,
    embedding_gradients,
    logit_parts,
    token_scores,
)
from moresjax.core.errors import UserError, choice_error
from moresjax.core.row import Row
from moresjax.inference.arguments import PromptOptions
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import PromptImages
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.base import WeightDelta
from moresjax.tuning.merge import merged

NEW = 16  # new tokens of an answer that is not given


@dataclasses.dataclass(frozen=True)
class TokenAttribution:
    """How much each token of a prompt adds to an answer.

    Attributes:
      answer: The answer.
      value: Its log-probability, or its difference from that of the other answer.
      tokens: The prompt's tokens as text; `<image>` for visual ones.
      scores: The score of each of them `[S]`.
      kinds: The `TokenKind` of each of them `[S]`.
      grids: The scores of each image's patches `[N, Y, X]`; nan where a patch has no token, empty
        where there are no images or tokens have no place on them.
    """

    answer: str
    value: float
    tokens: list[str]
    scores: Float[np.ndarray, " S"]
    kinds: np.ndarray
    grids: Float[np.ndarray, "N Y X"]


def attribute_tokens(
    model: Model,
    prompt: str,
    images: PromptImages = (),
    *,
    answer: str | None = None,
    against: str | None = None,
    method: str = "input_x_gradient",
    **pointing: Unpack[PromptOptions],
) -> TokenAttribution:
    """Which tokens and patches of a prompt an answer comes from, by derivatives.

    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = attribute_tokens(talking_model(), "how many ?", image, answer="two")
    >>> len(found.scores) == len(found.tokens), found.grids.shape
    (True, (1, 3, 3))

    Args:
      model: The model.
      prompt: What the user says.
      images: One image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      against: Another answer. Then the scores are about the difference of the log-probabilities of
        both, so that what speaks for any answer cancels.
      method: `input_x_gradient` or `gradient_norm`.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`, or there is no such method.
    """
    if method not in METHODS:
        raise choice_error("method of attribution", method, METHODS)
    row = model.prompts.asked(prompt, images, **pointing)
    marks = pointing.get("marks")
    if answer is None:
        answer = model.generate(prompt, images, max_new_tokens=NEW, **pointing)
        if not answer:
            raise UserError("the model says nothing; give the answer to explain")
    texts = [answer] if against is None else [answer, against]
    encode = model.prompts.with_answer
    pairs = [encode(row, prompt, images, text, marks=marks) for text in texts]
    heads, new = zip(*pairs, strict=True)
    wholes = [head.append(ids) for head, ids in pairs]
    longest, width = max(map(len, wholes)), max(map(len, new))
    batch = model.service.batch(wholes, longest)
    queries, targets, weights = np.zeros((3, len(texts), width), np.int32)
    for number, (head, ids) in enumerate(pairs):
        queries[number, : len(ids)] = np.arange(len(ids)) + len(head) - 1
        targets[number, : len(ids)], weights[number, : len(ids)] = ids, 1
    with use_mesh(model.mesh):
        values, embedded, gradients = embedding_gradients(
            model.mllm, batch, queries, targets, weights.astype(np.float32)
        )
    signs = [1, -1][: len(texts)]
    size = min(map(len, heads))
    if method == "gradient_norm":
        gradient = sum(s * g[:size] for s, g in zip(signs, gradients, strict=True))
        scores = token_scores(embedded[0, :size], np.asarray(gradient), method)
    else:
        pieces = zip(signs, embedded, gradients, strict=True)
        scores = sum(s * token_scores(e[:size], g[:size], method) for s, e, g in pieces)
    scores, value = np.asarray(scores), float(np.dot(signs, values))
    own = heads[0][:size]
    return TokenAttribution(
        answer, value, model.prompts.token_texts(own), scores, own.kind, _grids(model, own, scores)
    )


def attribute_logit(
    model: Model,
    prompt: str,
    images: PromptImages = (),
    *,
    answer: str | None = None,
    against: str | None = None,
    **pointing: Unpack[PromptOptions],
) -> LogitParts:
    """What every head, MLP and edit adds to the logit of an answer's first token.

    >>> from moresjax.testing import talking_model
    >>> parts = attribute_logit(talking_model("none"), "how many ?", answer="two", against="one")
    >>> parts.heads.shape, abs(parts.total - parts.logit) < 1e-4
    ((2, 4), True)

    Args:
      model: The model; weight deltas such as LoRA are folded in first.
      prompt: What the user says.
      images: One image or a list of images.
      answer: The answer; default: the model's own first token.
      against: Another answer, the logit of whose first token is subtracted.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`, for answers that begin with the same token, and for a weight
        delta that cannot be merged.
    """
    row = model.prompts.asked(prompt, images, **pointing)
    marks = pointing.get("marks")
    mllm = model.mllm
    if any(isinstance(method, WeightDelta) for _, method in mllm.tuning.methods):
        mllm = merged(mllm)

    def first(text: str) -> tuple[Row, int]:
        head, ids = model.prompts.with_answer(row, prompt, images, text, marks=marks)
        return head, int(ids[0])

    if answer is None:
        said = model.generate(prompt, images, max_new_tokens=1, details=True, **pointing)
        head, token = row, int(said.tokens[0])
    else:
        head, token = first(answer)
    other = None if against is None else first(against)[1]
    if other == token:
        raise UserError(f"{answer or 'the answer'} and {against} begin with the same token")
    batch = model.service.batch([head], len(head))
    with use_mesh(model.mesh):
        return logit_parts(mllm, batch, len(head) - 1, token, other)


def _grids(model: Model, row: Row, scores: np.ndarray) -> Float[np.ndarray, "N Y X"]:
    visual = scores[row.image >= 0]
    empty: Any = np.zeros((0, 0, 0))
    if not len(visual):
        return empty
    try:
        return image_grids(visual, row.num_images, model.config)
    except UserError:  # learned queries have no place on the image
        return empty
