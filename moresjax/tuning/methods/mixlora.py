"""MixLoRA: low-rank factors chosen from a pool by each example (Shen et al. 2024).

Axis legend: B examples, S tokens, D features in, F features out, E pool size, r rank.

    y = x W + (2E / r) sum_i (x . a_i) b_i,    a_1 .. a_r and b_1 .. b_r from pools of E

The mean of an example's inputs scores the pools: `g_A = mean(x) G_A`, and with `conditional`
factors `g_B = softmax(mean(x) G_B) + sum_i softmax(a_i G_AB_i)`; the r best of each are taken, best
with best. As released, chosen factors are not weighted by their scores, so routers get no gradient
and choose at random; with `scored` each factor of A is multiplied by its probability. A generated
token is routed by itself, so cached decoding differs from one pass over the whole text. One row is
one example: packed rows share a choice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.ranges import Size
from moresjax.tuning.base import LinearLike, ModelConfig, Params, Sites, WeightDelta, register
from moresjax.tuning.sites import check_rank, linear_sites


@register
@dataclasses.dataclass(frozen=True)
class MixLoRA(WeightDelta):
    """MixLoRA on the linears named by `targets`."""

    name = "mixlora"
    sees_tokens = True
    by_rows = ("a", "b")
    factors: Size = 16
    rank: Size = 4
    conditional: bool = False
    scored: bool = False
    targets: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.factors:
            raise UserError(f"mixlora:rank={self.rank} exceeds its factors={self.factors}")

    def sites(self, config: ModelConfig) -> Sites:
        shapes = linear_sites(self, config, self.targets)
        check_rank(self, self.rank, shapes)
        return shapes

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int) -> Params:
        pools = 3 + self.rank * self.conditional
        # In one draw: the pool of A, both routers, and one router for each chosen factor.
        shape, bound = (pools, d_in, self.factors), d_in**-0.5
        drawn = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        params = {"a": drawn[0].T, "b": jnp.zeros((self.factors, d_out))}
        params |= {"router_a": drawn[1], "router_b": drawn[2]}
        return params | ({"router_ab": drawn[3:]} if self.conditional else {})

    def neutral(self, params: Params) -> Params:
        return params | {"b": jnp.zeros_like(params["b"])}

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        tokens = params["tokens"][..., None]
        mean = jnp.where(tokens, x, 0).astype(jnp.float32).sum(1) / jnp.maximum(tokens.sum(1), 1)
        score = mean @ params["router_a"]
        _, chosen = jax.lax.top_k(score, self.rank)
        a = params["a"][chosen]  # [B, r, D]
        score_b = jax.nn.softmax(mean @ params["router_b"])
        if self.conditional:
            own = jnp.einsum("brd,rde->bre", a, params["router_ab"])
            score_b = score_b + jax.nn.softmax(own).sum(1)
        b = params["b"][jax.lax.top_k(score_b, self.rank)[1]]  # [B, r, F]
        if self.scored:
            a = a * jnp.take_along_axis(jax.nn.softmax(score), chosen, axis=1)[..., None]
        low = jnp.einsum("bsd,brd->bsr", x, a.astype(x.dtype))
        scale = 2 * self.factors / self.rank
        return linear(x) + scale * jnp.einsum("bsr,brf->bsf", low, b.astype(x.dtype))
