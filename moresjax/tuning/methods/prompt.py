"""Prompt tuning: learned embeddings before the first token (Lester et al. 2021)."""

import dataclasses

import jax
from jaxtyping import PRNGKeyArray

from moresjax.tuning.base import ModelConfig, Params, Sites, VirtualTokens, register


@register
@dataclasses.dataclass(frozen=True)
class Prompt(VirtualTokens):
    """`length` learned tokens at the input of the LLM, from N(0, 0.02^2)."""

    name = "prompt"

    def sites(self, config: ModelConfig) -> Sites:
        return {"llm.embed": (config.llm.hidden_size,)}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        return {"embedding": 0.02 * jax.random.normal(key, (self.length, dim))}
