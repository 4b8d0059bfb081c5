"""Houlsby adapters: two bottlenecks per block (Houlsby et al. 2019, figure 2).

Axis legend: B batch, S tokens, D hidden size, m bottleneck.

    h' = h + gelu(h A + a) B + b        on the outputs of attention and MLP, before the residual

`B` and `b` start at zero, so the block starts as it was (the paper starts close to that).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ops import project
from moresjax.core.ranges import Size
from moresjax.tuning.base import Edit, ModelConfig, Params, Sites, register

SITES = ("llm.block.attn.out", "llm.block.mlp.out")


@register
@dataclasses.dataclass(frozen=True)
class Houlsby(Edit):
    """Both bottlenecks, on all tokens, also generated ones."""

    name = "houlsby"
    width = "bottleneck"
    positions: str = "all"
    bottleneck: Size = 64

    def sites(self, config: ModelConfig) -> Sites:
        return {site: (config.llm.hidden_size,) for site in SITES}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        return {
            "down": 0.01 * jax.random.normal(key, (dim, self.bottleneck)),
            "down_bias": jnp.zeros(self.bottleneck),
            "up": jnp.zeros((self.bottleneck, dim)),
            "up_bias": jnp.zeros(dim),
        }

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        params = {name: x.astype(h.dtype) for name, x in params.items()}
        low = jax.nn.gelu(project(h, params["down"]) + params["down_bias"], approximate=False)
        return project(low, params["up"]) + params["up_bias"]
