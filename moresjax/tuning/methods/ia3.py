"""IA3: learned rescaling of keys, values and the MLP's inner activations (Liu et al. 2022).

Axis legend: D features in, F features out.

    k, v:   y = l * (x W + b)        down:   y = (l * x) W + b        l = 1 at the start

Which linears are scaled on their input, `inputs` says; all others are on their output.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import choice_error
from moresjax.tuning.base import LinearLike, ModelConfig, Params, Sites, WeightDelta, register
from moresjax.tuning.sites import linear_sites

NO_INPUTS = "none"


@register
@dataclasses.dataclass(frozen=True)
class IA3(WeightDelta):
    """IA3 on the linears named by `targets`; those among `inputs` are scaled on their input."""

    name = "ia3"
    targets: str = "k;v;down"
    inputs: str = "down"

    def sites(self, config: ModelConfig) -> Sites:
        shapes, inputs = linear_sites(self, config, self.targets), self.inputs.split(";")
        names = {*config.llm.linears(), *(site.split(".")[-1] for site in shapes), NO_INPUTS}
        for name in inputs:
            if name not in names:
                raise choice_error("linear in ia3:inputs", name, sorted(names))
        return {site: (*dims, site.split(".")[-1] in inputs) for site, dims in shapes.items()}

    def initial(self, key: PRNGKeyArray, d_in: int, d_out: int, on_input: bool) -> Params:
        return {"scale_in": jnp.ones(d_in)} if on_input else {"scale_out": jnp.ones(d_out)}

    def neutral(self, params: Params) -> Params:
        return {name: jnp.ones_like(x) for name, x in params.items()}

    def apply(
        self,
        params: Params,
        linear: LinearLike,
        x: Float[Array, "*B D"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B F"]:
        if "scale_in" in params:
            return linear(x * params["scale_in"].astype(x.dtype))
        return linear(x) * params["scale_out"].astype(x.dtype)

    def merge(
        self, params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        if "scale_in" in params:
            return (kernel * params["scale_in"][:, None]).astype(kernel.dtype), bias
        scale = params["scale_out"]
        kernel = (kernel * scale).astype(kernel.dtype)
        return kernel, None if bias is None else (bias * scale).astype(bias.dtype)
