"""VeRA: trained vectors around one pair of random matrices (Kopiczko et al. 2024).

Axis legend: D features in, F features out, r rank, D*, F* the widest of all tuned linears.

    y = x W + lambda_b * ((lambda_d * (dropout(x) A)) B),   lambda_b = 0,  lambda_d = 0.1

`A` (D* x r) and `B` (r x F*) are frozen, shared by all layers and linears, and cut to their widths.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ops import project
from moresjax.core.ranges import Range, Rate, Size
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
from moresjax.tuning.sites import linear_sites


def torch_uniform(rng: np.random.RandomState, shape: tuple[int, int]) -> Float[np.ndarray, "a b"]:
    """PyTorch's Kaiming-uniform matrix `[rows, fan_in]` from the Mersenne twister of `rng`.

    PyTorch makes a float of the low 24 bits of every word, so the projections of an adapter that
    `peft` saved without them can be made again from its seed.
    """
    words = rng.randint(0, 1 << 32, shape, np.uint32) & ((1 << 24) - 1)
    bound = np.float32((6 / shape[1]) ** 0.5).astype(np.float64)
    return (words * 2.0**-24 * (2 * bound) - bound).astype(np.float32)


@register
@dataclasses.dataclass(frozen=True)
class VeRA(WeightDelta):
    """VeRA on the linears named by `targets`; `seed` makes the random matrices."""

    name = "vera"
    rank: Size = 256
    dropout: Rate = 0.0
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    targets: str = "q;v"

    def kind(self) -> Method:
        # The widest of its linears decides the frozen matrices.
        return dataclasses.replace(super().kind(), targets=self.targets)

    def sites(self, config: ModelConfig) -> Sites:
        return linear_sites(self, config, self.targets)

    def shared(self, config: ModelConfig) -> dict[str, AnyArray]:
        widest = np.max(list(self.sites(config).values()), axis=0)
        rng = np.random.RandomState(self.seed)
        a = torch_uniform(rng, (self.rank, int(widest[0])))
        b = torch_uniform(rng, (int(widest[1]), self.rank))
        return {"a": a.T, "b": b.T}

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        return {"lambda_d": jnp.full(self.rank, 0.1), "lambda_b": jnp.zeros(d_out)}

    def neutral(self, params: Params) -> Params:
        return params | {"lambda_b": jnp.zeros_like(params["lambda_b"])}

    def factors(
        self, params: Params, d_in: int, dtype: DTypeLike
    ) -> tuple[Float[Array, "D r"], Float[Array, "r F"]]:
        """The two low-rank factors of one linear."""
        b = params["b"][:, : len(params["lambda_b"])] * params["lambda_b"]
        return (params["a"][:d_in] * params["lambda_d"]).astype(dtype), b.astype(dtype)

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        a, b = self.factors(params, x.shape[-1], x.dtype)
        return linear(x) + project(project(dropped(x, self.dropout, key), a), b)

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        a, b = self.factors(params, len(kernel), jnp.float32)
        return kernel + (a @ b).astype(kernel.dtype), bias
