"""The attention sinks of one answer.

Axis legend: L layers, S tokens, G tokens of the answer, Q places for them, T tokens with virtual
ones, D features, J sink dimensions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.analysis.attention import AttentionMaps
from moresjax.analysis.capture import OutputProbe
from moresjax.analysis.causes import Structure
from moresjax.analysis.sinks import TAU, SinkShares, sink_dimensions, sink_shares, sink_values
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, visible
from moresjax.inference.arguments import Adapters, PromptOptions
from moresjax.inference.prompt_inputs import PromptImages
from moresjax.inference.questions import ask
from moresjax.models.mllm import MLLM
from moresjax.sharding.mesh import use_mesh

if TYPE_CHECKING:
    from moresjax.inference.model import Model


@dataclasses.dataclass(frozen=True)
class Sinks:
    """The attention sinks of a prompt, and what its answer's attention is without them.

    Attributes:
      answer: The answer.
      tokens: The prompt's and the answer's tokens as text; `<image>` for visual ones.
      dimensions: The sink dimensions `[J]`.
      values: The largest |x_d| / rms(x) over these of each token, as each layer reads it `[L, S]`.
      sinks: Which tokens are sinks `[L, S]`.
      visual: Which tokens are visual `[S]`.
      shares: Share and LMAR with and without the sinks.
    """

    answer: str
    tokens: list[str]
    dimensions: list[int]
    values: Float[np.ndarray, "L S"]
    sinks: Bool[np.ndarray, "L S"]
    visual: Bool[np.ndarray, " S"]
    shares: SinkShares

    @property
    def counts(self) -> Int[np.ndarray, "L 2"]:
        """How many visual tokens and how many others are sinks in each layer."""
        own = self.sinks & self.visual, self.sinks & ~self.visual
        return np.stack([each.sum(1) for each in own], -1)


def find_sinks(
    model: "Model",
    prompt: str,
    images: PromptImages,
    *,
    answer: str | None = None,
    tau: float = TAU,
    dimensions: Sequence[int] | None = None,
    adapters: Adapters = None,
    **pointing: Unpack[PromptOptions],
) -> Sinks:
    """Names visual and text attention sinks, and gives share and LMAR with and without them.

    >>> from moresjax.testing import talking_model
    >>> image = np.zeros((12, 12, 3), np.uint8)
    >>> found = find_sinks(talking_model(), "how many ?", image, answer="two", tau=2.5)
    >>> found.sinks.shape, found.shares.share_without.shape  # 2 layers, 13 tokens; 4 groups
    ((2, 13), (2, 4))

    A token is a sink of a layer where |x_d| / rms(x) of what the layer reads is at least `tau` in
    a sink dimension; see `moresjax.analysis.sinks` for the rule and its source.

    Args:
      model: The model.
      prompt: What the user says.
      images: An image or a list of images.
      answer: The answer; default: the model's own, 16 tokens at most.
      tau: The least value of a sink.
      dimensions: The sink dimensions; default: those in which the prompt's first token has such a
        value in some layer.
      adapters: The name of the loaded adapter to use.
      pointing: `roi` and `marks` of `Model.generate`.

    Raises:
      UserError: As `causes`; tau is not above 0, or there is no such dimension.
    """
    size = model.config.llm.hidden_size
    if not tau > 0:
        raise UserError(f"tau must be above 0, got {tau}")
    if wrong := [d for d in dimensions or () if not 0 <= d < size]:
        raise UserError(f"the LLM has dimensions 0 to {size - 1}, got {wrong[0]}")
    asked = ask(model, prompt, images, answer, adapters=adapters, pointing=pointing)
    queries = jnp.asarray(asked.reading.queries)[None]
    with use_mesh(model.mesh):
        found = _read(asked.split.structure, asked.split.state, asked.batch, queries)
    count, new = len(asked.row) + len(asked.ids) - 1, len(asked.ids)
    virtual, extra = model.mllm.tuning.num_virtual_tokens, model.mllm.tuning.num_extra_tokens
    attention = np.asarray(found[0])[:, :new, virtual : virtual + count]
    states = np.asarray(found[1], np.float32)[:, extra : extra + count]
    own = sink_dimensions(states, tau) if dimensions is None else list(dimensions)
    values = sink_values(states, own)
    sinks = values >= tau
    seen = np.asarray(visible(asked.batch.layout, queries))[0, :new, :count]
    kind = np.asarray(asked.batch.layout.kind)[0, :count]
    row = asked.row.append(asked.ids[:-1])
    shares = sink_shares(attention, kind, seen, sinks)
    tokens, visual = model.prompts.token_texts(row), row.image >= 0
    return Sinks(asked.answer, tokens, own, values, sinks, visual, shares)


@functools.partial(jax.jit, static_argnums=0)
def _read(
    structure: Structure, state: nnx.State, batch: Batch, queries: Int[Array, "1 Q"]
) -> tuple[Float[Array, "L Q T"], Float[Array, "L U D"]]:
    """Attention of the queries, and what every layer reads."""
    model: MLLM = nnx.merge(structure.graphdef, state)
    probes = AttentionMaps(), OutputProbe("llm.embed.out"), OutputProbe("llm.block.out")
    stats = model(batch, probes=probes, queries=queries).stats
    first, outputs = (stats[probe.name] for probe in probes[1:])
    return stats["maps"][:, 0], jnp.concatenate([first[:, 0], outputs[:-1, 0]])
