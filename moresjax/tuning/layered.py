"""Functions of one layer's parameters, for stacked ones."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from moresjax.tuning.base import Method, Params, WeightDelta


def initial_params(method: Method, shape: tuple, layers: int, key: PRNGKeyArray) -> Params:
    """Initial parameters of a method at one site."""
    if not layers:
        return method.initial(key, *shape)
    return method.initial_layers(key, layers, *shape)


# Compiled once for all sites and models of a kind.
initial_params_jitted = functools.partial(jax.jit, static_argnums=(0, 1, 2))(initial_params)


def prepare_layers(method: Method, params: Params, layer_mask: Array | None) -> Params:
    """Parameters as a forward pass uses them, with the axes that the layer mask has."""
    return _for_each(method.prepare, layer_mask)(params)


def _for_each(
    function: Callable[[Params], Params], layer_mask: Array | None
) -> Callable[[Params], Params]:
    """`function` of one layer's parameters, mapped over the axes that the layer mask has."""
    for _ in range(0 if layer_mask is None else layer_mask.ndim):
        function = jax.vmap(function)
    return function


def mask_layers(method: WeightDelta, params: Params, layer_mask: Array) -> Params:
    """Stacked parameters that are neutral in the layers that are switched off."""

    def choose(on: Array, off: Array) -> Array:
        mask = layer_mask.reshape(*layer_mask.shape, *[1] * (on.ndim - layer_mask.ndim))
        return jnp.where(mask, on, off)

    return jax.tree.map(choose, params, _for_each(method.neutral, layer_mask)(params))
