"""Prompt tuning: learned embeddings before the first token (Lester et al. 2021)."""

import dataclasses

import jax

from moresjax.errors import UserError
from moresjax.tuning.base import Slots, register


@register
@dataclasses.dataclass(frozen=True)
class Prompt(Slots):
    """`length` learned tokens, seen by everything; they take the first rotary positions."""

    name = "prompt"
    length: int = 10

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"prompt:length must be at least 1, got {self.length}")

    def sites(self, config):
        return {"llm.embed": (config.llm.hidden_size,)}

    def initial(self, key, dim):
        return {"embedding": 0.02 * jax.random.normal(key, (self.length, dim))}

    def content(self, theta):
        return theta["embedding"]
