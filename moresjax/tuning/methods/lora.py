"""LoRA: low-rank additions to linears (Hu et al. 2021).

Axis legend: B batch, D features in, F features out, r rank.

    y = x W + s dropout(x) A B,    A ~ U(-1/sqrt(D), 1/sqrt(D)),  B = 0

with `s = alpha / r`, or `alpha / sqrt(r)` when rank-stabilised (Kalajdzievski 2023).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moresjax.core.ops import project
from moresjax.tuning.base import WeightDelta, dropped, register
from moresjax.tuning.sites import linear_sites
from moresjax.tuning.spec import check_rank


@register
@dataclasses.dataclass(frozen=True)
class LoRA(WeightDelta):
    """LoRA on the linears named by `targets`; `alpha` 0 stands for twice the rank."""

    name = "lora"
    rank: int = 8
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str = "all"

    def __post_init__(self):
        check_rank(self)

    @property
    def scale(self) -> float:
        return (self.alpha or 2.0 * self.rank) / (self.rank**0.5 if self.rslora else self.rank)

    def sites(self, config):
        return linear_sites(self, config, self.targets)

    def initial(self, key, d_in, d_out):
        bound = d_in**-0.5
        a = jax.random.uniform(key, (d_in, self.rank), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out))}

    def neutral(self, params):
        return params | {"b": jnp.zeros_like(params["b"])}

    def added(self, params, x):
        """`s x A B`."""
        low = project(x, params["a"].astype(x.dtype))
        return self.scale * project(low, params["b"].astype(x.dtype))

    def apply(self, params, linear, x, key=None):
        return linear(x) + self.added(params, dropped(x, self.dropout, key))

    def merge(self, params, kernel, bias):
        return kernel + (self.scale * params["a"] @ params["b"]).astype(kernel.dtype), bias
