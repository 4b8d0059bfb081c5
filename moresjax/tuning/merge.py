"""Folding weight deltas into the weights they act on."""

import functools
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.errors import UserError
from moresjax.tuning.attach import Tuning, mask_layers
from moresjax.tuning.base import Edit, Params, VirtualTokens, WeightDelta


@runtime_checkable
class TunedModel(Protocol):
    """A model with a tuning attached (`models.mllm.MLLM`)."""

    tuning: Tuning


Model = TypeVar("Model", bound=TunedModel)
_IN_ATTENTION = ("q", "k", "v", "o")


def merged(model: Model) -> Model:
    """A copy of the model in which every weight delta is folded into its linear.

    What acts on activations stays attached; `full` leaves nothing behind but its weights.

    Raises:
      UserError: when an attached weight delta cannot be merged, or several adapters are loaded.
    """
    model = nnx.clone(model)
    tuning = model.tuning
    tuning.check_single("merging")
    for key, method in tuning.methods:
        if isinstance(method, WeightDelta):
            for site, variables in tuning.params[key].items():
                params = {name: jnp.asarray(x[...]) for name, x in variables.items()}
                params = mask_layers(method, params, tuning.layer_masks[key][site][...])
                _merge_site(model, site, method, params, tuning.common(key))
    model.tuning = tuning.subset(lambda method: isinstance(method, Edit | VirtualTokens))
    return model


def check_stacked(model: TunedModel) -> None:
    """Raises a `UserError` when a model has generated and holds its blocks one by one since."""
    if isinstance(functools.reduce(getattr, ("llm", "blocks"), model), nnx.List):
        raise UserError(
            "the model holds its blocks one by one since it has generated; `Model.restack()` "
            "stacks them again"
        )


def linear_path(site: str) -> tuple[str, ...]:
    """Path in the model of the stacked linear that a site such as `llm.block.q` names."""
    tower, _, name = site.split(".")
    return tower, "blocks", "attn" if name in _IN_ATTENTION else "mlp", name


def linear_at(model: TunedModel, site: str) -> Any:
    """The stacked linear that a site names (`models.layers.Linear`).

    Raises:
      UserError: when the blocks are held one by one.
    """
    check_stacked(model)
    return functools.reduce(getattr, linear_path(site), model)


def _merge_site(
    model: TunedModel, site: str, method: WeightDelta, params: Params, common: Params
) -> None:
    linear = linear_at(model, site)
    if linear.scale is not None:
        raise UserError(f"{method.name} cannot be merged into int8 weights; load them as they are")
    bias = None if linear.bias is None else linear.bias[...]

    def merge(
        params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        return method.merge(params | common, kernel, bias)

    kernel, bias = jax.jit(jax.vmap(merge))(params, linear.kernel[...], bias)
    linear.kernel[...] = kernel
    if linear.bias is not None:
        linear.bias[...] = bias
