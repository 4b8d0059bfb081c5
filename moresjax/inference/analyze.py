"""What a model looks at while it answers: the notebook's `mj.analyze`, with what it needs besides.

Concepts of states (`learn`, `ground_text`, `ground_images`, `stability`), their shifts
(`measure_shift`), steering vectors (`coarse`, `contrast`, `fine`), probes (`separability`) and
sensitivities (`concept_sensitivity`) come from `moresjax.analysis`.

Axis legend: N images, L layers, G new tokens, V visual tokens, Y, X patches of an image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from moresjax.analysis.attention import (
    AttentionMaps,
    AttentionProbe,
    AttentionSummary,
    image_grids,
    summarize,
)
from moresjax.analysis.concepts import learn as learn
from moresjax.analysis.concepts import stability as stability
from moresjax.analysis.grounding import ground_images as ground_images
from moresjax.analysis.grounding import ground_text as ground_text
from moresjax.analysis.sensitivity import concept_sensitivity as concept_sensitivity
from moresjax.analysis.separability import separability as separability
from moresjax.analysis.shift_study import measure_shift as measure_shift
from moresjax.analysis.states import States as States
from moresjax.analysis.steering import coarse as coarse
from moresjax.analysis.steering import contrast as contrast
from moresjax.analysis.steering import fine as fine
from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.inference.arguments import Adapters, PromptOptions
from moresjax.inference.attribution import attribute_logit as attribute_logit
from moresjax.inference.attribution import attribute_tokens as attribute_tokens
from moresjax.inference.causes import causes as causes
from moresjax.inference.causes import knockouts as knockouts
from moresjax.inference.lens import logit_lens as logit_lens
from moresjax.inference.model import Model
from moresjax.inference.patching import patching as patching
from moresjax.inference.prompt_inputs import (
    Images,
    PromptImages,
    check_images,
    pair_images,
    pair_pointed,
)
from moresjax.inference.pruning import faithfulness as faithfulness
from moresjax.inference.pruning import pruning as pruning
from moresjax.inference.sensitivity import answer_gradients as answer_gradients
from moresjax.inference.sinks import find_sinks as find_sinks


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Where on its images each token of an answer looks.

    Attributes:
      tokens: The new tokens as text, one entry per token.
      grids: For every image the attention of each layer and token on its patches `[N, L, G, Y, X]`,
        averaged over heads; nan where a patch has no token.
    """

    tokens: list[str]
    grids: Float[np.ndarray, "N L G Y X"]

    @property
    def grid(self) -> Float[np.ndarray, "L G Y X"]:
        """The attention on the patches of the only image.

        Raises:
          UserError: There are several images.
        """
        if len(self.grids) != 1:
            raise UserError(f"the map is of {len(self.grids)} images; `grids` has one for each")
        return self.grids[0]


def attention(
    model: Model,
    prompts: str | Sequence[str],
    images: Images,
    *,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    adapters: Adapters = None,
    **pointing: Unpack[PromptOptions],
) -> AttentionSummary:
    """How much attention answers pay to the image, the question and the rest, layer by layer.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> summary = attention(talking_model(), ["how many ?"], [image], max_new_tokens=2)
    >>> summary.share.shape  # layers, groups of tokens
    (2, 4)

    Args:
      model: The model that answers.
      prompts: What the user says, one text or a list of texts.
      images: For one text an image or a list of images; for a list of texts a list that has an
        image, a list of images or None for each. Prompts without images are not counted.
      max_new_tokens: Answers have at most this many tokens, and statistics are over these tokens.
      batch_size: How many prompts are answered at a time.
      adapters: The name of the loaded adapter that answers, or for every prompt its name.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`, and when no prompt has an image.
    """
    texts, own = pair_images(prompts, images)
    if not any(own):
        raise UserError("attention statistics need at least one prompt with an image")
    regions, marks = pair_pointed(prompts, **pointing)
    rows, probe = model.prompts.rows(texts, own, None, regions, marks), AttentionProbe()
    done = model.service.generate_many(
        rows,
        max_new_tokens,
        batch_size=batch_size,
        probes=(probe,),
        adapters=model.adapter_names(adapters, len(rows)),
    )
    stats = [completion.stats[probe.name] for completion in done]
    return summarize(
        np.stack([one["mass"] for one in stats], 1),
        np.stack([one["score"] for one in stats], 1),
        np.asarray([len(completion.tokens) for completion in done]),
        np.asarray([row.num_images > 0 for row in rows]),
    )


def attention_map(
    model: Model,
    prompt: str,
    image: PromptImages,
    *,
    max_new_tokens: int = 16,
    **pointing: Unpack[PromptOptions],
) -> AttentionMap:
    """Answers a question about images and maps the attention of every token of the answer.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = attention_map(talking_model(), "how many ?", image, max_new_tokens=1)
    >>> len(found.tokens), found.grid.shape
    (1, (2, 1, 3, 3))
    >>> attention_map(talking_model(), "the same ?", [image] * 2, max_new_tokens=1).grids.shape
    (2, 2, 1, 3, 3)

    Args:
      model: The model that answers.
      prompt: What the user says.
      image: An image or a list of images: paths, PIL images or uint8 arrays `[Y, X, 3]`.
      max_new_tokens: The answer has at most this many tokens.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `Model.generate`, without an image, and for a connector whose tokens have no
        place on the image.
    """
    own = check_images(image)
    if not own:
        raise UserError("an attention map needs an image")
    row = model.prompts.asked(prompt, own, **pointing)
    generation = model.service.generate_rows([row], max_new_tokens)
    count = int(generation.length[0])
    tokens = np.asarray(generation.tokens)[0, :count]
    texts = [model.prompts.tokenizer.decode([token]) for token in tokens]
    return AttentionMap(texts, _grids(model, row, tokens, len(own)))


def answer_map(
    model: Model, prompt: str, image: PromptImages, tokens: Ids, **pointing: Unpack[PromptOptions]
) -> tuple[UInt8[np.ndarray, "Y X 3"], Float[np.ndarray, "L _ _"]]:
    """Where a given answer looks on the only image of its question, in one forward pass.

    Args:
      model: The model.
      prompt: The question.
      image: Its image.
      tokens: The tokens of the answer.
      pointing: `roi` and `marks` of the question, as a benchmark says them.

    Returns:
      The image as the model is given it, and the attention on its patches: mean over heads and the
      answer's tokens.

    Raises:
      UserError: As `attention_map`, and for several images.
    """
    own = check_images(image)
    if len(own) != 1:
        raise UserError(f"the map of an answer needs one image, got {len(own)}")
    row = model.prompts.row(prompt, own, **pointing)
    (grid,) = _grids(model, row, tokens, 1)
    processor = model.prompts.processor.image
    assert processor is not None  # else the row had no image
    return processor.to_picture(np.asarray(row.pixels)[0]), grid.mean(1)


def _grids(model: Model, row: Row, tokens: Ids, images: int) -> Float[np.ndarray, "N L G Y X"]:
    """The attention of each of the tokens that follow a prompt on the patches of its images."""
    whole = row.append(tokens)
    batch = model.service.batch([whole], len(whole))
    queries = jnp.arange(len(row) - 1, len(whole) - 1)[None]
    maps = model.mllm(batch, probes=(AttentionMaps(),), queries=queries).stats["maps"]
    visual = np.flatnonzero(whole.image >= 0) + model.mllm.tuning.num_virtual_tokens
    values = np.asarray(maps)[:, 0][:, :, visual]
    return image_grids(values, images, model.config)
