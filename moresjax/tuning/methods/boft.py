"""BOFT: a product of sparse rotations of a linear's input, and a scale (Liu et al. 2023).

Axis legend: D features in, F features out, m butterfly factors, n = D / b blocks, b block size.

    y = s * (x R_m .. R_1 W) + bias,   R_i = P_i blockdiag(C_i1 .. C_in) P_i^T

`C` is the Cayley transform of a stored matrix's skew part. `P_i` regroups features so that factor
i mixes blocks 2^(i-1) apart, as in a fast Fourier transform.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.ranges import Range, Size
from moresjax.tuning.base import LinearLike, ModelConfig, Params, Sites, WeightDelta, register
from moresjax.tuning.rotations import cayley, check_divides, rotate, skew_part
from moresjax.tuning.sites import linear_sites


def butterfly_order(features: int, block: int, factor: int) -> Int[np.ndarray, "D"]:
    """Order of features before factor number `factor` (from 0).

    In every run of 2^factor blocks the even half blocks come first, then the odd ones.
    """
    halves = np.arange(features).reshape(-1, 2**factor, 2, block // 2)
    return halves.swapaxes(1, 2).reshape(-1)


@register
@dataclasses.dataclass(frozen=True)
class BOFT(WeightDelta):
    """BOFT on the linears named by `targets`."""

    name = "boft"
    whole = True
    block_size: Size = 4
    factors: Annotated[int, Range(1, limit=32)] = 1
    targets: str = "q;v"

    def sites(self, config: ModelConfig) -> Sites:
        if self.block_size % 2:
            raise UserError(f"boft needs an even block_size, got {self.block_size}")
        shapes = linear_sites(self, config, self.targets)
        for site, (d_in, _) in shapes.items():
            run = self.block_size * 2 ** (self.factors - 1)
            check_divides(self, "block_size * 2^(factors-1)", run, d_in, f"inputs of {site}")
        return shapes

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        b = self.block_size
        return {"matrix": jnp.zeros((self.factors, d_in // b, b, b)), "scale": jnp.ones(d_out)}

    def neutral(self, params: Params) -> Params:
        return {"matrix": jnp.zeros_like(params["matrix"]), "scale": jnp.ones_like(params["scale"])}

    def prepare(self, params: Params) -> Params:
        return {"rotation": cayley(skew_part(params["matrix"])), "scale": params["scale"]}

    def turned(
        self, x: Float[Array, "*B D"], rotation: Float[Array, "m n b b"], inverse: bool = False
    ) -> Float[Array, "*B D"]:
        """`x R_m .. R_1`, or `x` times its inverse."""
        for factor in range(self.factors) if inverse else reversed(range(self.factors)):
            order = butterfly_order(x.shape[-1], self.block_size, factor)
            blocks = rotation[factor].mT if inverse else rotation[factor]
            x = rotate(x[..., np.argsort(order)], blocks)[..., order]
        return x

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        bias = 0 if linear.bias is None else linear.bias[...].astype(x.dtype)
        y = linear(self.turned(x, params["rotation"])) - bias
        return y * params["scale"].astype(x.dtype) + bias

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        params = self.prepare(params)
        # R W = (W^T R^T)^T, and a rotation's transpose is its inverse.
        turned = self.turned(kernel.T, params["rotation"], inverse=True).T
        return (turned * params["scale"]).astype(kernel.dtype), bias
