"""The low-rank edit that MoReS, MRT and the ReFT family share.

Axis legend: B batch, S tokens, D features, r rank.

    h' = h + (h W^T + b - s h R) R^T        W (r x D), b (r), R (D x r), s = 0 or 1

A method says which terms it has: whether the columns of `R` are orthonormal, whether `h R` is
subtracted (s) and whether there is a `W`. `R` is stored raw and orthonormalised in the forward
pass, so that saving, loading and resuming keep it exactly orthonormal.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.linalg import inverse_cholesky
from moresjax.core.ops import project
from moresjax.core.ranges import Positive
from moresjax.tuning.base import Edit, Method, ModelConfig, Params, Sites
from moresjax.tuning.sites import edit_dim
from moresjax.tuning.spec import check_choice


def orthonormalize(raw: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """Q of the QR decomposition whose R has a positive diagonal (fp32).

    Computed by Cholesky, `A chol(A^T A)^{-T}`, twice for precision: that works on rows split over
    devices (one r x r reduction), and for r = 1 is a normalisation. Its gradient does not exist for
    linearly dependent columns: never start from zeros.
    """
    a = raw.astype(jnp.float32)
    # Columns of unit length first: r = 1 is then done, and the Gram matrix is well scaled.
    a = a / jnp.linalg.norm(a, axis=0, keepdims=True)
    for _ in range(2 if a.shape[1] > 1 else 0):
        gram = jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST)
        a = jnp.matmul(a, inverse_cholesky(gram).T, precision=jax.lax.Precision.HIGHEST)
    return a


def orthonormalize_some(raw: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """`orthonormalize` of the columns that are not zero.

    Those of zeros, the room that a smaller rank leaves, stay zeros, have no part in the others and
    get no gradient.
    """
    a = raw.astype(jnp.float32)
    absent = (a == 0).all(axis=0)
    a = jnp.where(absent, 1, a)
    a = jnp.where(absent, 0, a / jnp.linalg.norm(a, axis=0, keepdims=True))
    for _ in range(2):
        gram = jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST)
        gram = jnp.where(jnp.diag(absent), 1, gram)
        a = jnp.matmul(a, inverse_cholesky(gram).T, precision=jax.lax.Precision.HIGHEST)
    return a


@dataclasses.dataclass(frozen=True)
class LowRankEdit(Edit, abc.ABC):
    """A low-rank edit at `site`.

    Attributes:
      rank: r.
      init: `paper` starts from a random `R` and torch's default linear, which is not the identity;
        `identity` starts with a delta of zero.
      orthogonal: whether the columns of `R` are orthonormal; otherwise it is a parameter as it
        stands, and starts like torch's linear.
      subtracts: whether `h R` is subtracted.
      has_weight: whether there is a `W`; otherwise `b` starts uniform in [0, 1), as in pyreft.
      room: whether columns of `R` may be zeros, which are as good as absent (`widened`).
    """

    rank: Positive = 4
    init: str = "paper"
    site: str = "llm.block.out"
    room: bool = dataclasses.field(default=False, init=False)

    by_rows: ClassVar[tuple[str, ...]] = ("weight",)
    width: ClassVar[str] = "rank"
    orthogonal: ClassVar[bool] = True
    subtracts: ClassVar[bool] = True
    has_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # h R cannot be cancelled without a W.
        constant = self.subtracts and not self.has_weight
        check_choice(self, "init", ("paper",) if constant else ("paper", "identity"))

    def sites(self, config: ModelConfig) -> Sites:
        dim = edit_dim(self, self.site, config)
        if self.rank > dim:
            raise UserError(
                f"{self.name}:rank={self.rank} exceeds the hidden size {dim} at {self.site}"
            )
        return {self.site: (dim,)}

    def rotation(self, raw: Float[Array, "D r"]) -> Float[Array, "D r"]:
        """`R` as the edit uses it."""
        if not self.orthogonal:
            return raw
        return orthonormalize_some(raw) if self.room else orthonormalize(raw)

    def widened(self, width: int) -> Method:
        wide = super().widened(width)
        object.__setattr__(wide, "room", True)
        return wide

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        k_rotate, k_weight, k_bias = jax.random.split(key, 3)

        def uniform(key: PRNGKeyArray, *shape: int) -> Array:
            return jax.random.uniform(key, shape, minval=-(dim**-0.5), maxval=dim**-0.5)

        if self.orthogonal:
            rotate = orthonormalize(jax.random.normal(k_rotate, (dim, self.rank)))
        else:
            rotate = uniform(k_rotate, dim, self.rank)
        params = {"rotate": rotate}
        if self.init == "identity":
            if self.has_weight:
                params["weight"] = rotate.T if self.subtracts else jnp.zeros_like(rotate.T)
            return params | {"bias": jnp.zeros(self.rank)}
        if not self.has_weight:
            return params | {"bias": jax.random.uniform(k_bias, (self.rank,))}
        weight, bias = uniform(k_weight, self.rank, dim), uniform(k_bias, self.rank)
        return params | {"weight": weight, "bias": bias}

    def prepare(self, params: Params) -> Params:
        rotate = self.rotation(params["rotate"])
        prepared = {"up": rotate.T, "bias": params["bias"]}
        if self.has_weight:
            # h W^T - h R in one product.
            down = params["weight"].T
            return prepared | {"down": down - rotate if self.subtracts else down}
        return prepared | {"down": -rotate} if self.subtracts else prepared

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        low = jnp.broadcast_to(params["bias"], (*h.shape[:-1], self.rank))
        if "down" in params:
            low = low + project(h.astype(jnp.float32), params["down"])
        return project(low, params["up"])
