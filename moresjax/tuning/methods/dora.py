"""DoRA: LoRA on the direction of every output's weights, and a trained length (Liu et al. 2024).

Axis legend: D features in, F features out, r rank.

    W' = m * V / |V|,   V = W + s A B,   |V| over the D inputs, held constant in the gradient

The length `m` starts at `|W|` and is stored as its distance from there, so that a fresh adapter
does not need the weights; gradients and optimizer steps are those of `m`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.ops import project
from moresjax.tuning.base import LinearLike, Params, dropped, register
from moresjax.tuning.methods.lora import LoRA


def lengths(kernel: Float[Array, "... D F"]) -> Float[Array, "... F"]:
    """Norms of the weights of every output feature, in fp32."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


@register
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA on the linears named by `targets`, with the keys of LoRA."""

    name = "dora"
    whole = True

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        return super().initial(key, d_in, d_out) | {"longer": jnp.zeros(d_out)}

    def neutral(self, params: Params) -> Params:
        return super().neutral(params) | {"longer": jnp.zeros_like(params["longer"])}

    def stretch(self, params: Params, kernel: Float[Array, "D F"]) -> Float[Array, "F"]:
        """`m / |V|`, one factor per output feature."""
        kernel = kernel.astype(jnp.float32)
        direction = kernel + self.scale * params["a"] @ params["b"]
        constant = jax.lax.stop_gradient(lengths(direction))
        return (jax.lax.stop_gradient(lengths(kernel)) + params["longer"]) / constant

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        kernel = linear.dense()
        stretch = self.stretch(params, kernel).astype(x.dtype)
        low = dropped(x, self.dropout, key)
        # Dropout reaches the stretched part of the frozen product too, as in `peft`.
        product = project(low, kernel.astype(x.dtype))
        return linear(x) + (stretch - 1) * product + stretch * self.added(params, low)

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        merged, _ = super().merge(params, kernel, bias)
        return (merged * self.stretch(params, kernel)).astype(kernel.dtype), bias
