"""Folding weight deltas into the weights they act on."""

import jax
from flax import nnx

from moresjax.errors import UserError
from moresjax.tuning.attach import gated
from moresjax.tuning.base import Edit, Method, Slots, WeightDelta

_IN_ATTENTION = ("q", "k", "v", "o")


def merged(model: nnx.Module) -> nnx.Module:
    """A copy of the model in which every weight delta is folded into its linear.

    What acts on activations stays attached; `full` leaves nothing behind but its weights.

    Raises:
      UserError: when an attached weight delta cannot be merged.
    """
    model = nnx.clone(model)
    tuning = model.tuning
    for key, method in tuning.methods:
        if isinstance(method, WeightDelta):
            for site, variables in tuning.theta[key].items():
                theta = {name: x[...] for name, x in variables.items()}
                _merge_site(model, site, method, gated(method, theta, tuning.gates[key][site][...]))
    model.tuning = tuning.subset(lambda method: isinstance(method, Edit | Slots))
    return model


def _merge_site(model, site: str, method: Method, theta) -> None:
    tower, _, name = site.split(".")
    blocks = getattr(model, tower).blocks
    linear = getattr(blocks.attn if name in _IN_ATTENTION else blocks.mlp, name)
    if linear.scale is not None:
        raise UserError(f"{method.name} cannot be merged into int8 weights; load them as they are")
    bias = None if linear.bias is None else linear.bias[...]
    kernel, bias = jax.vmap(method.merge)(theta, linear.kernel[...], bias)
    linear.kernel[...] = kernel
    if bias is not None:
        linear.bias[...] = bias
