"""Steering with a given vector: nothing trains.

Axis legend: B batch, S tokens, D features, L layers.

    h' = h + alpha v
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import FINITE
from moresjax.tuning.base import Edit, ModelConfig, Params, Sites, register
from moresjax.tuning.sites import edit_dim


@register
@dataclasses.dataclass(frozen=True)
class Steer(Edit):
    """Adds `alpha` times a vector, taken as it is.

    `positions=generated` steers what is generated after the first new token, `all` the prompt too.

    Attributes:
      vector: `FILE.npz` with one array or `FILE.npz:KEY`, an array `[D]`, or `[L, D]` whose row l
        steers layer l; without it zeros, to be set with `Model.set`.
      alpha: strength, which `Model.set` sets too: one program serves all values.
    """

    name = "steer"
    constant = True
    positions: str = "all"
    vector: str = dataclasses.field(default="", compare=False)
    alpha: Annotated[float, FINITE] = dataclasses.field(default=1.0, compare=False)
    site: str = "llm.block.out"

    def sites(self, config: ModelConfig) -> Sites:
        return {self.site: (edit_dim(self, self.site, config),)}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        vector = read_vector(self.vector, dim) if self.vector else np.zeros(dim, np.float32)
        return {"vector": jnp.asarray(vector), "alpha": jnp.asarray(self.alpha, jnp.float32)}

    def initial_layers(self, key: PRNGKeyArray, layers: int, *shape: Any) -> Params:
        (dim,) = shape
        vector = np.zeros(dim, np.float32)
        if self.vector:
            vector = read_vector(self.vector, dim, layers)
        return {
            "vector": jnp.broadcast_to(vector, (layers, dim)),
            "alpha": jnp.full(layers, self.alpha, jnp.float32),
        }

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return jnp.broadcast_to(params["alpha"] * params["vector"], h.shape)


def read_vector(source: str, dim: int, layers: int = 0) -> np.ndarray:
    """The array `[D]` at `FILE.npz` or `FILE.npz:KEY`, in fp32.

    Args:
      source: The file and the name of the array in it.
      dim: D.
      layers: L at a layered site, where `[L, D]` will do too; else 0.

    Raises:
      UserError: when it is not there, has another shape, or is not finite.
    """
    file, dot, key = source.partition(".npz")
    path, key = Path(file + dot), key.removeprefix(":")
    try:
        arrays = np.load(path, allow_pickle=False)
        names = list(arrays.keys())
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile):
        raise UserError(f"steer:vector={source!r} is not a readable FILE.npz[:KEY]") from None
    if key not in names and (key or len(names) != 1):
        raise choice_error(f"array in {path}", key, names)
    vector = arrays[key or names[0]]
    shapes = [(dim,), *([(layers, dim)] if layers else [])]
    if vector.shape not in shapes or not np.isfinite(vector).all():
        rows = f"; {layers} x {dim} would give every layer its own" if layers else ""
        raise UserError(
            f"steer:vector={source!r} must be {dim} finite numbers, got shape {vector.shape}{rows}"
        )
    return vector.astype(np.float32)
