"""Steering with a given vector: nothing trains.

Axis legend: B batch, S tokens, D features, L layers. `u` is `v / ||v||`.

    add       h + alpha v
    project   h - alpha (h u) u                takes the component along v away (alpha = 1: all)
    clamp     h - (h u) u + alpha v            gives it the value that it has in alpha v

Sources: adding, Turner et al. 2023 and Khayatan et al. 2025; projecting, Arditi et al. 2024; gates,
Lee et al. 2025.
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
from moresjax.tuning.base import Edit, Method, ModelConfig, Params, Sites, register
from moresjax.tuning.sites import edit_dim
from moresjax.tuning.spec import check_choice

MODES = ("add", "project", "clamp")
GATES = ("none", "above", "below")


@register
@dataclasses.dataclass(frozen=True)
class Steer(Edit):
    """Adds `alpha` times a vector, or takes its direction away.

    `positions=generated` steers what is generated after the first new token, `all` the prompt too,
    `last_prompt|generated` every new token and nothing else.

    Attributes:
      vector: `FILE.npz` with one array or `FILE.npz:KEY`, an array `[D]`, or `[L, D]` whose row l
        steers layer l; without it zeros, to be set with `Model.set`.
      alpha: strength, which `Model.set` sets too: one program serves all values.
      mode: `add`, `project` or `clamp`.
      gate: `above` steers only the tokens whose component along `condition` is above `threshold`
        before the edit, `below` those where it is not; `none` steers all.
      condition: the direction of the gate, as `vector`; zeros, which is the default, stand for the
        vector itself.
      threshold: in units of the activations; `Model.set` sets it and `condition` too.
      keep_norm: whether a steered token gets back the norm that it had.
    """

    name = "steer"
    constant = True
    positions: str = "all"
    vector: str = dataclasses.field(default="", compare=False)
    alpha: Annotated[float, FINITE] = dataclasses.field(default=1.0, compare=False)
    site: str = "llm.block.out"
    mode: str = "add"
    gate: str = "none"
    condition: str = dataclasses.field(default="", compare=False)
    threshold: Annotated[float, FINITE] = dataclasses.field(default=0.0, compare=False)
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "mode", MODES)
        check_choice(self, "gate", GATES)
        if self.gate == "none" and (self.condition or self.threshold):
            raise UserError("steer: condition and threshold are those of gate=above or gate=below")

    def kind(self) -> Method:
        own = {"vector": "", "alpha": 1.0, "condition": "", "threshold": 0.0}
        return dataclasses.replace(super().kind(), **own)

    def sites(self, config: ModelConfig) -> Sites:
        return {self.site: (edit_dim(self, self.site, config),)}

    def initial(self, key: PRNGKeyArray, dim: int) -> Params:
        return self._constants(dim, 0)

    def initial_layers(self, key: PRNGKeyArray, layers: int, *shape: Any) -> Params:
        (dim,) = shape
        return self._constants(dim, layers)

    def _constants(self, dim: int, layers: int) -> Params:
        """What is given, with a leading layer axis where the site is layered."""
        axis = (layers,) if layers else ()

        def vector(source: str) -> np.ndarray:
            found = read_vector(source, dim, layers) if source else np.zeros(dim, np.float32)
            return np.broadcast_to(found, (*axis, dim))

        given: dict[str, Any] = {
            "vector": vector(self.vector),
            "alpha": np.full(axis, self.alpha, np.float32),
        }
        if self.gate != "none":
            given["condition"] = vector(self.condition)
            given["threshold"] = np.full(axis, self.threshold, np.float32)
        return {name: jnp.asarray(value) for name, value in given.items()}

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        vector = params["vector"]
        moved = params["alpha"] * vector
        if self.mode == "add" and self.gate == "none" and not self.keep_norm:
            return jnp.broadcast_to(moved, h.shape)
        state = h.astype(jnp.float32)
        if self.mode == "add":
            delta = jnp.broadcast_to(moved, h.shape)
        else:
            unit = _unit(vector)
            along = _component(state, unit)[..., None] * unit
            delta = -params["alpha"] * along if self.mode == "project" else moved - along
        if self.keep_norm:
            after = state + delta
            norm, own = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (after, state))
            scaled = after * (own / jnp.where(norm > 0, norm, 1.0))
            # Where nothing moves, no rounding moves it either.
            delta = jnp.where((delta != 0).any(-1, keepdims=True), scaled - state, 0.0)
        if self.gate != "none":
            condition = params["condition"]
            condition = jnp.where((condition != 0).any(), condition, vector)
            above = _component(state, _unit(condition)) > params["threshold"]
            chosen = above if self.gate == "above" else ~above
            delta = jnp.where(chosen[..., None], delta, 0.0)
        return delta


def _unit(vector: Float[Array, " D"]) -> Float[Array, " D"]:
    """The vector with length 1; zeros stay zeros."""
    norm = jnp.linalg.norm(vector)
    return vector / jnp.where(norm > 0, norm, 1.0)


def _component(h: Float[Array, "B S D"], unit: Float[Array, " D"]) -> Float[Array, "B S"]:
    """The length of every state along a direction; in full precision on every device."""
    return (h * unit).sum(-1)


def read_vector(source: str, dim: int, layers: int = 0) -> np.ndarray:
    """The array `[D]` or `[L, D]` at `FILE.npz` or `FILE.npz:KEY`, in fp32.

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
