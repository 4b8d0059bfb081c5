"""Connectors with random parameters, shared by their tests."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moresjax.core.parameter_names import path_name

TOLERANCE = 1e-4
TINY_RESAMPLER = "resampler:latents=5,layers=2,heads=2,head_dim=4"
TINY_QFORMER = "qformer:latents=5,layers=4,width=8,heads=2,mlp=12"


def features(count: int = 7, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, count, width)).astype(np.float32)


def randomised(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Every parameter far from its start value, so that a forgotten one shows."""
    rng, new = np.random.default_rng(seed), []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = 0.3 * rng.standard_normal(variable.shape, np.float32) + (path[-1] == "scale")
        new.append((path, variable.replace(jnp.asarray(value))))
    nnx.update(model, nnx.from_flat_state(new))
    return model


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path_name(path): np.asarray(x.get_value()) for path, x in flat}
