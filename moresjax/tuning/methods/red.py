"""RED: a learned scale and shift of the MLP's output (representation editing, Wu et al. 2024).

Axis legend: B batch, S tokens, D hidden size.

    h' = l * h + b        l = 1, b = 0 at the start: the identity
"""

import dataclasses

import jax.numpy as jnp

from moresjax.tuning.base import Edit, register
from moresjax.tuning.sites import edit_dim


@register
@dataclasses.dataclass(frozen=True)
class RED(Edit):
    """RED at `site`, on all tokens, also generated ones."""

    name = "red"
    positions: str = "all"
    site: str = "llm.block.mlp.out"

    def sites(self, config):
        return {self.site: (edit_dim(self, config),)}

    def initial(self, key, dim):
        return {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}

    def delta(self, params, h):
        return h.astype(jnp.float32) * (params["scale"] - 1) + params["bias"]
