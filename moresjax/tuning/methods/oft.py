"""OFT: rotations of a linear's input, in blocks (Qiu et al. 2023; the form of `peft` >= 0.18).

Axis legend: D features in, n = D / b blocks, b block size.

    y = (x R) W + bias,   R = blockdiag(R_1 .. R_n),   Q_i skew-symmetric

    neumann: R_i = I + 2Q + 2Q^2 + 2Q^3 + Q^4        exact: R_i = (I - Q)(I + Q)^-1

The two turn in opposite directions. A block is stored as the b(b-1)/2 numbers above Q's diagonal.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ranges import Range
from moresjax.tuning.base import LinearLike, ModelConfig, Params, Sites, WeightDelta, register
from moresjax.tuning.rotations import (
    cayley,
    cayley_neumann,
    check_divides,
    rotate,
    skew_from_vector,
)
from moresjax.tuning.sites import linear_sites
from moresjax.tuning.spec import check_choice


@register
@dataclasses.dataclass(frozen=True)
class OFT(WeightDelta):
    """OFT on the linears named by `targets`."""

    name = "oft"
    whole = True
    block_size: Annotated[int, Range(2, limit=1 << 16)] = 32
    cayley: str = "neumann"
    targets: str = "q;k;v"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "cayley", ("neumann", "exact"))

    def sites(self, config: ModelConfig) -> Sites:
        shapes = linear_sites(self, config, self.targets)
        for site, (d_in, _) in shapes.items():
            check_divides(self, "block_size", self.block_size, d_in, f"inputs of {site}")
        return shapes

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        b = self.block_size
        return {"skew": jnp.zeros((d_in // b, b * (b - 1) // 2))}

    def neutral(self, params: Params) -> Params:
        return {"skew": jnp.zeros_like(params["skew"])}

    def prepare(self, params: Params) -> Params:
        skew = skew_from_vector(params["skew"], self.block_size)
        return {"rotation": (cayley if self.cayley == "exact" else cayley_neumann)(skew)}

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        return linear(rotate(x, params["rotation"]))

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        # R W, one column of W at a time: (W^T R^T)^T.
        turned = rotate(kernel.T, self.prepare(params)["rotation"].mT).T
        return turned.astype(kernel.dtype), bias
