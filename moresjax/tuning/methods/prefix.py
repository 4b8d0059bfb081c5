"""Prefix tuning: learned keys and values in every block (Li and Liang 2021).

Axis legend: P virtual tokens, F features of all key heads.

    attention(q, [P_k; k], [P_v; v])

The learned keys are used as they are, so a rotary position is part of what is learned; the text
stands P positions further on, as behind a cache of P tokens. `peft` does the same.
"""

import dataclasses

import jax
from jaxtyping import PRNGKeyArray

from moresjax.tuning.base import ModelConfig, Params, Sites, VirtualTokens, register


@register
@dataclasses.dataclass(frozen=True)
class Prefix(VirtualTokens):
    """`length` keys and values per block of the LLM, from N(0, 0.02^2)."""

    name = "prefix"

    def sites(self, config: ModelConfig) -> Sites:
        return {"llm.block.kv": (config.llm.linears()["k"][1],)}

    def initial(self, key: PRNGKeyArray, features: int) -> Params:
        shape = self.length, features
        keys = zip("kv", jax.random.split(key), strict=True)
        return {name: 0.02 * jax.random.normal(own, shape) for name, own in keys}
