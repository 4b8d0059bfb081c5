"""RED: a learned scale and shift of the MLP's output (representation editing, Wu et al. 2024).

Axis legend: B batch, S tokens, D hidden size.

    h' = l * h + b        l = 1, b = 0 at the start: the identity
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.tuning.base import Edit, ModelConfig, Params, Sites, register
from moresjax.tuning.sites import edit_dim


@register
@dataclasses.dataclass(frozen=True)
class RED(Edit):
    """RED at `site`, on all tokens, also generated ones."""

    name = "red"
    positions: str = "all"
    site: str = "llm.block.mlp.out"

    def sites(self, config: ModelConfig) -> Sites:
        return {self.site: (edit_dim(self, self.site, config),)}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        return {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return h.astype(jnp.float32) * (params["scale"] - 1) + params["bias"]
