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

    llm: Any
    vision: Any
    connector: Any
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
    model.llm.restack()  # of the copy: a model that has generated holds its blocks one by one
    tuning = model.tuning
    tuning.check_single("merging")
    for key, method in tuning.methods:
        if isinstance(method, WeightDelta):
            for site, variables in tuning.params[key].items():
                params = {name: jnp.asarray(x[...]) for name, x in variables.items()}
                if (layer_mask := tuning.layer_mask(key, site)) is not None:
                    params = mask_layers(method, params, layer_mask)
                _merge_site(model, site, method, params, tuning.common(key))
    model.tuning = tuning.subset(lambda method: isinstance(method, Edit | VirtualTokens))
    return model


def linear_path(site: str) -> tuple[str, ...]:
    """Path in the model of the linear that a site names, of all its layers: `llm.block.q`."""
    tower, *_, name = site.split(".")
    if tower == "connector":
        return tower, "layers", name
    return tower, "blocks", "attn" if name in _IN_ATTENTION else "mlp", name


def linears_at(model: TunedModel, site: str) -> list[Any]:
    """What holds the layers of the linear that a site names, in order (`models.layers.Linear`).

    One stack; two where the last blocks of the vision encoder are held apart; a linear for every
    layer of an LLM that has generated; a single linear outside the blocks.
    """
    tower, _, *rest = linear_path(site)
    if tower == "connector":
        return [model.connector.layers[int(rest[0])]]
    module = getattr(model, tower)
    blocks = [module.blocks, getattr(module, "last", None)]
    if isinstance(module.blocks, nnx.List):
        blocks = [*module.blocks]
    return [functools.reduce(getattr, rest, each) for each in blocks if each is not None]


def dense_at(model: TunedModel, site: str, layer: int) -> Float[Array, "D F"]:
    """W of one layer of the linear that a site names, whatever it is stored as."""
    for linear in linears_at(model, site):
        stacked = linear.kernel[...].ndim == 3
        count = len(linear.kernel[...]) if stacked else 1
        if layer < count:
            return linear.dense()[layer] if stacked else linear.dense()
        layer -= count
    raise IndexError(f"{site} has no layer {layer}")


def _merge_site(
    model: TunedModel, site: str, method: WeightDelta, params: Params, common: Params
) -> None:
    start = 0
    for linear in linears_at(model, site):
        if linear.scale is not None:
            raise UserError(
                f"{method.name} cannot be merged into int8 weights; load them as they are"
            )
        bias, own = None if linear.bias is None else linear.bias[...], params
        if linear.kernel[...].ndim == 3:
            count = len(linear.kernel[...])
            own = {name: x[start : start + count] for name, x in params.items()}
            start += count
        kernel, bias = _folded(method, own, common, linear.kernel[...], bias)
        linear.kernel[...] = kernel
        if linear.bias is not None:
            linear.bias[...] = bias


@functools.partial(jax.jit, static_argnums=0)
def _folded(
    method: WeightDelta,
    params: Params,
    common: Params,
    kernel: Float[Array, "*L D F"],
    bias: Float[Array, "*L F"] | None,
) -> tuple[Float[Array, "*L D F"], Float[Array, "*L F"] | None]:
    """Kernel and bias with the delta in them, layer by layer where they are stacked.

    Compiled once for all models of a shape.
    """

    def fold(
        params: Params, kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
    ) -> tuple[Float[Array, "D F"], Float[Array, "F"] | None]:
        return method.merge(params | common, kernel, bias)

    return (jax.vmap(fold) if kernel.ndim == 3 else fold)(params, kernel, bias)
