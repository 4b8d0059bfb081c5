"""What every layer would say next: the logit lens, for text tokens and on the grid of an image.

Axis legend: L layers, S tokens, K most likely tokens, W words, N images, D features, V vocabulary
(of grids: visual tokens), Y, X patches.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.attention import image_grids
from moresjax.analysis.capture import OutputProbe
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.inference.arguments import Adapters, PromptOptions
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import PromptImages, check_images
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import use_mesh


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """The next tokens that each layer's states stand for, at every token of a prompt.

    Attributes:
      tokens: The prompt's tokens as text; `<image>` for visual ones.
      top: The most likely next tokens as text, `top[layer][token][rank]`.
      logprobs: Their natural log-probabilities `[L, S, K]`.
      words: The words that were asked about.
      word_logprobs: The log-probabilities of the words' first tokens `[L, S, W]`.
      grids: For every image the words' log-probabilities at its visual tokens, on its patches
        `[N, W, L, Y, X]`; nan where a patch has no token. None where the connector's tokens have no
        place on the image, without images, and without words.
    """

    tokens: list[str]
    top: list[list[list[str]]]
    logprobs: Float[np.ndarray, "L S K"]
    words: tuple[str, ...]
    word_logprobs: Float[np.ndarray, "L S W"]
    grids: Float[np.ndarray, "N W L Y X"] | None


def logit_lens(
    model: Model,
    prompt: str,
    images: PromptImages = (),
    *,
    words: Sequence[str] | None = (),
    top: int = 5,
    adapters: Adapters = None,
    **pointing: Unpack[PromptOptions],
) -> LogitLens:
    """Reads each layer's output through the final norm and the vocabulary head.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> lens = logit_lens(talking_model(), "how many ?", image, words=["two"])
    >>> lens.logprobs.shape, lens.grids.shape  # 2 layers, 13 tokens; 3 x 3 patches
    ((2, 13, 5), (1, 1, 2, 3, 3))

    In the last layer these are the model's own log-probabilities.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      words: Words whose first tokens are looked at in every layer, and on the images; None: the K
        tokens that the last layer finds likeliest at the end of the prompt.
      top: K, how many of the most likely tokens are kept.
      adapters: The name of the loaded adapter to use.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`, for a word without tokens, and for `top` below 1.
    """
    vocab = model.config.llm.vocab_size
    if not 1 <= top <= vocab:
        raise UserError(f"top must be from 1 to {vocab}, got {top}")
    own = check_images(images)
    row = model.prompts.asked(prompt, own, **pointing)
    chosen = None
    if words is not None:
        marks = pointing.get("marks")
        pairs = [model.prompts.with_answer(row, prompt, own, x, marks=marks) for x in words]
        chosen = jnp.asarray([int(ids[0]) for _, ids in pairs], jnp.int32)
    batch = model.service.batch([row], len(row), model.adapter_names(adapters, 1))
    graphdef, state = nnx.split(model.mllm)
    with use_mesh(model.mesh):
        found = _lens(graphdef, top, state, batch, chosen)
    ids, logprobs, asked = (np.asarray(x) for x in found)
    decode = model.prompts.tokenizer.decode
    visual = row.image >= 0
    tokens = model.prompts.token_texts(row)
    texts = [[[decode([i]) for i in place] for place in layer] for layer in ids]
    names = tuple(texts[-1][-1] if words is None else words)
    return LogitLens(
        tokens, texts, logprobs, names, asked, _grids(model, asked[:, visual], len(own))
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lens(
    graphdef: nnx.GraphDef,
    top: int,
    state: nnx.State,
    batch: Batch,
    chosen: Int[Array, " W"] | None,
) -> tuple[Int[Array, "L S K"], Float[Array, "L S K"], Float[Array, "L S W"]]:
    """The most likely tokens, their log-probabilities, and those of the chosen tokens.

    Without chosen ones, they are those that the last layer finds likeliest at the last token.
    """
    model: MLLM = nnx.merge(graphdef, state)
    probe = OutputProbe("llm.block.out")
    h = model(batch, probes=(probe,)).stats[probe.name][:, 0, model.tuning.num_extra_tokens :]

    def read(h: Float[Array, "S D"]) -> Float[Array, "S V"]:
        return model.llm.logits(model.llm.norm(h[None]))[0]

    if chosen is None:
        chosen = jax.lax.top_k(read(h[-1, -1:])[0], top)[1]

    def one_layer(h: Float[Array, "S D"]) -> tuple[Array, Array, Array]:
        logits = read(h)
        logprobs = jax.nn.log_softmax(logits)
        values, ids = jax.lax.top_k(logprobs, top)
        return ids, values, logprobs[:, chosen]

    return jax.lax.map(one_layer, h)  # one layer's logits are in memory at a time


def _grids(
    model: Model, values: Float[np.ndarray, "L V W"], images: int
) -> Float[np.ndarray, "N W L Y X"] | None:
    """Values of the visual tokens of all images on their patches."""
    if not images or not values.shape[-1]:
        return None
    try:
        return image_grids(np.moveaxis(values, -1, 0), images, model.config)
    except UserError:  # learned queries have no place on the image
        return None
