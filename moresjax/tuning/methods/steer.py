"""Steering with a given vector: nothing trains.

Axis legend: B batch, S tokens, D features.

    h' = h + alpha v
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Annotated

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
      vector: `FILE.npz` with one array or `FILE.npz:KEY`, an array `[D]`; without it zeros, to be
        set in `tuning.params`.
      alpha: strength, also stored in `tuning.params`: one program serves all values.
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

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return jnp.broadcast_to(params["alpha"] * params["vector"], h.shape)


def read_vector(source: str, dim: int) -> np.ndarray:
    """The array `[D]` at `FILE.npz` or `FILE.npz:KEY`, in fp32.

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
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise UserError(
            f"steer:vector={source!r} must be {dim} finite numbers, got shape {vector.shape}"
        )
    return vector.astype(np.float32)
