"""PTUM: learned tokens at every layer of the LLM (Yang et al. 2023).

Axis legend: P virtual tokens, X text and visual tokens, D features.

    h_l = block_l([P_l; X_{l-1}])

What a block makes of its learned tokens is dropped: the next block reads its own.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ranges import Size
from moresjax.tuning.base import ModelConfig, Params, Sites, VirtualTokens, register


def uniform_tokens(key: PRNGKeyArray, length: int, dim: int, fan_in: int) -> Float[Array, "P D"]:
    """Learned tokens, uniform within `sqrt(6 / (fan_in + D))`; with `fan_in` P that is Xavier's."""
    bound = (6 / (fan_in + dim)) ** 0.5
    return jax.random.uniform(key, (length, dim), minval=-bound, maxval=bound)


@register
@dataclasses.dataclass(frozen=True)
class PTUM(VirtualTokens):
    """`length` learned tokens, Xavier-uniform at the start.

    Attributes:
      deep: whether every block has its own; otherwise the first block only, and the tokens go on
        from there like any others.
    """

    name = "ptum"
    length: Size = 64
    deep: bool = True

    def sites(self, config: ModelConfig) -> Sites:
        return {"llm.block.in" if self.deep else "llm.embed": (config.llm.hidden_size,)}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        return {"embedding": uniform_tokens(key, self.length, dim, self.length)}
