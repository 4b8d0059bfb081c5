"""OFT as `peft` 0.10 had it, and LLaVA Steering used it: rotations of a linear's output.

Axis legend: F features out, n blocks of b = F / n features.

    y = (x W) blockdiag(R_1 .. R_n) + bias,   R_i = (I - Q)(I + Q)^-1,   Q = (M_i - M_i^T) / 2

Every block stores all of M_i (b x b), about twice what it can use.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ranges import Size
from moresjax.tuning.base import LinearLike, ModelConfig, Params, Sites, WeightDelta, register
from moresjax.tuning.rotations import cayley, check_divides, rotate, skew_part
from moresjax.tuning.sites import linear_sites


@register
@dataclasses.dataclass(frozen=True)
class LegacyOFT(WeightDelta):
    """The first OFT of `peft` on the linears named by `targets`."""

    name = "oft-legacy"
    whole = True
    blocks: Size = 16
    targets: str = "q;k;v"

    def sites(self, config: ModelConfig) -> Sites:
        shapes = linear_sites(self, config, self.targets)
        for site, (_, d_out) in shapes.items():
            check_divides(self, "blocks", self.blocks, d_out, f"outputs of {site}")
        return shapes

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        size = d_out // self.blocks
        return {"matrix": jnp.zeros((self.blocks, size, size))}

    def neutral(self, params: Params) -> Params:
        return {"matrix": jnp.zeros_like(params["matrix"])}

    def prepare(self, params: Params) -> Params:
        return {"rotation": cayley(skew_part(params["matrix"]))}

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        bias = 0 if linear.bias is None else linear.bias[...].astype(x.dtype)
        return rotate(linear(x) - bias, params["rotation"]) + bias

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        return rotate(kernel, self.prepare(params)["rotation"]).astype(kernel.dtype), bias
