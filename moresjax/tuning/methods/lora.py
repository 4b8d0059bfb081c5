"""LoRA: low-rank additions to linears (Hu et al. 2021).

Axis legend: B batch, D features in, F features out, r rank.

    y = x W + s dropout(x) A B,    A ~ U(-1/sqrt(D), 1/sqrt(D)),  B = 0

with `s = alpha / r`, or `alpha / sqrt(r)` when rank-stabilised (Kalajdzievski 2023).
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ops import project
from moresjax.core.ranges import FINITE, Rate, Size
from moresjax.core.types import AnyArray
from moresjax.tuning.base import (
    LinearLike,
    Method,
    ModelConfig,
    Params,
    Sites,
    WeightDelta,
    dropped,
    register,
)
from moresjax.tuning.sites import check_rank, linear_sites


@register
@dataclasses.dataclass(frozen=True)
class LoRA(WeightDelta):
    """LoRA on the linears named by `targets`; without an `alpha` it is twice the rank."""

    name = "lora"
    width = "rank"
    rank: Size = 8
    alpha: Annotated[float | None, FINITE] = None
    dropout: Rate = 0.0
    rslora: bool = False
    targets: str = "all"

    @property
    def scaled_by(self) -> float:
        """Alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor of `x A B`, s."""
        return self.scaled_by / (self.rank**0.5 if self.rslora else self.rank)

    def widened(self, width: int) -> "LoRA":
        scaled = self.scale * (width**0.5 if self.rslora else width)
        return dataclasses.replace(self, rank=width, alpha=None if scaled == 2 * width else scaled)

    def kind(self) -> Method:
        return dataclasses.replace(super().kind(), rank=1, alpha=1.0, rslora=False)

    def of_kind(self, params: dict[str, AnyArray]) -> dict[str, AnyArray]:
        b: AnyArray = self.scale * params["b"]
        return params | {"b": b}

    def sites(self, config: ModelConfig) -> Sites:
        shapes = linear_sites(self, config, self.targets)
        check_rank(self, self.rank, shapes)
        return shapes

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        bound = d_in**-0.5
        a = jax.random.uniform(key, (d_in, self.rank), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out))}

    def neutral(self, params: Params) -> Params:
        return params | {"b": jnp.zeros_like(params["b"])}

    def added(self, params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """`s x A B`."""
        low = project(x, params["a"].astype(x.dtype))
        return self.scale * project(low, params["b"].astype(x.dtype))

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        return linear(x) + self.added(params, dropped(x, self.dropout, key))

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        return kernel + (self.scale * params["a"] @ params["b"]).astype(kernel.dtype), bias
