"""MoReS: modality linear representation-steering (LLaVA Steering, equations 3 and 4).

Axis legend: B batch, S tokens, D hidden size, r rank.

    h' = h + (h W^T + b - h R) R^T        at selected visual tokens of every selected block's output

`R` (D x r) has orthonormal columns. It is stored raw and orthonormalised in the forward pass, so
that saving, loading and resuming keep it exactly orthonormal. Steered tokens change what later
tokens attend to, through the KV cache; nothing is left to do while decoding. The last block's
output at a visual token feeds nothing, so with visual positions its parameters get a gradient of
exactly zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moresjax.errors import UserError
from moresjax.ops import project
from moresjax.tuning.base import Edit, Theta, register
from moresjax.tuning.sites import edit_dim
from moresjax.tuning.spec import check_choice, check_rank


def orthonormalize_qr(raw: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """The definition: Q of the QR decomposition whose R has a positive diagonal (fp32)."""
    q, r = jnp.linalg.qr(raw.astype(jnp.float32))
    sign = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
    return q * sign


def orthonormalize(raw: Float[Array, "D r"]) -> Float[Array, "D r"]:
    """The same matrix by Cholesky, `A chol(A^T A)^{-T}`, twice for precision.

    Works on rows split over devices (one r x r reduction), and for r = 1 is a normalisation. Its
    gradient does not exist for linearly dependent columns: never start from zeros.
    """
    a = raw.astype(jnp.float32)
    # Columns of unit length first: r = 1 is then done, and the Gram matrix is well scaled.
    a = a / jnp.linalg.norm(a, axis=0, keepdims=True)
    for _ in range(2 if a.shape[1] > 1 else 0):
        gram = jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST)
        factor = jnp.linalg.cholesky(gram)
        a = jax.scipy.linalg.solve_triangular(factor, a.T, lower=True).T
    return a


@register
@dataclasses.dataclass(frozen=True)
class MoReS(Edit):
    """MoReS at `site`.

    Attributes:
      rank: r.
      init: `paper` starts from a random `R` and torch's default linear (not the identity at step
        0); `identity` sets `W = R^T` and `b = 0`.
      orthonormal: `cholesky` or `qr`; two ways to the same matrix.
    """

    name = "mores"
    positions: str = "image:f4+l5"
    rank: int = 1
    init: str = "paper"
    orthonormal: str = "cholesky"
    site: str = "llm.block.out"

    def __post_init__(self):
        check_rank(self)
        check_choice(self, "init", ("paper", "identity"))
        check_choice(self, "orthonormal", ("cholesky", "qr"))

    def sites(self, config):
        dim = edit_dim(self, config)
        if self.rank > dim:
            raise UserError(f"mores:rank={self.rank} exceeds the hidden size {dim} at {self.site}")
        return {self.site: (dim,)}

    def initial(self, key, dim):
        k_rotate, k_weight, k_bias = jax.random.split(key, 3)
        rotate = orthonormalize(jax.random.normal(k_rotate, (dim, self.rank)))
        if self.init == "identity":
            return {"rotate": rotate, "weight": rotate.T, "bias": jnp.zeros(self.rank)}
        bound = dim**-0.5
        return {
            "rotate": rotate,
            "weight": jax.random.uniform(k_weight, (self.rank, dim), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(k_bias, (self.rank,), minval=-bound, maxval=bound),
        }

    def prepare(self, theta: Theta) -> Theta:
        fast = self.orthonormal == "cholesky"
        rotate = (orthonormalize if fast else orthonormalize_qr)(theta["rotate"])
        # h W^T - h R in one product.
        return {"up": rotate.T, "down": theta["weight"].T - rotate, "bias": theta["bias"]}

    def delta(self, theta, h):
        low = project(h.astype(jnp.float32), theta["down"]) + theta["bias"]
        return project(low, theta["up"])
