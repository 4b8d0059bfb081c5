"""Bottleneck adapters on the MLP's linears, the "Adapter" of LLaVA Steering's tables.

Axis legend: D features in, F features out, m bottleneck.

    up, gate (Phi's fc1):   y = linear(a(x))        down (Phi's fc2):   y = a(linear(x))
    a(x) = x + tanh(dropout(x) A) B,    A (D x m), B (m x D) ~ N(0, 0.02^2), no biases

It sits on the side of the linear that has the model's hidden size. It is not the identity at the
start, and cannot be merged.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ops import project
from moresjax.core.ranges import Rate, Size
from moresjax.tuning.base import (
    LinearLike,
    ModelConfig,
    Params,
    Sites,
    WeightDelta,
    dropped,
    register,
)
from moresjax.tuning.sites import linear_sites

# Linears whose output, not input, has the hidden size.
AFTER = ("down",)


@register
@dataclasses.dataclass(frozen=True)
class Adapter(WeightDelta):
    """Adapters on every linear of the decoder's MLPs; `dropout` is on the adapter's input."""

    name = "adapter"
    width = "bottleneck"
    bottleneck: Size = 256
    dropout: Rate = 0.05

    def sites(self, config: ModelConfig) -> Sites:
        names = "gate;up;down" if config.llm.gated_mlp else "up;down"
        shapes = linear_sites(self, config, names)
        return {site: (*dims, site.split(".")[-1] in AFTER) for site, dims in shapes.items()}

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int, after: bool) -> Params:
        dim, (k_in, k_out) = d_out if after else d_in, jax.random.split(key)
        into = 0.02 * jax.random.normal(k_in, (dim, self.bottleneck))
        out = 0.02 * jax.random.normal(k_out, (self.bottleneck, dim))
        side = "after" if after else "before"
        return {f"{side}_in": into, f"{side}_out": out}

    def neutral(self, params: Params) -> Params:
        return {name: jnp.zeros_like(x) for name, x in params.items()}

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        def adapted(x: Float[Array, "*B D"], side: str) -> Float[Array, "*B D"]:
            low = dropped(x, self.dropout, key)
            low = jnp.tanh(project(low, params[f"{side}_in"].astype(x.dtype)))
            return x + project(low, params[f"{side}_out"].astype(x.dtype))

        if "before_in" in params:
            return linear(adapted(x, "before"))
        return adapted(linear(x), "after")
