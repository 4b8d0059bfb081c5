"""Loss landscapes: the loss on a plane through trained parameters (Li et al. 2018).

    L(a, b) = loss(theta + a d1 + b d2),    d ~ N(0, 1),    d_f <- d_f / ||d_f|| ||theta_f||

`f` are the filters of a tensor: the columns of a kernel, the rows of a table and of what methods
call `by_rows`. Where each filter is as long as that of the parameters, surfaces of models with
parameters of other sizes can be compared. Biases, scales and other vectors stay as they are, and so
do the parameters of layers that a method leaves out.

Axis legend: P points of an axis, C points of a chunk.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.errors import UserError, choice_error
from moresjax.core.parameter_names import path_name
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit
from moresjax.tuning.sites import num_layers

NORMALIZE = ("filter", "layer", "none")
# Tables of the base model, by the last part of their names.
TABLES = ("table", "position", "registers", "latents")
RADIUS = 0.25  # within which the maximum is sought
ABOVE = 0.1  # how much above the centre is still low

# `loss(parameters, data)`, a number. It is compiled once for each value of it (see `jax.jit`).
Loss = Callable[[Any, Any], Array]
Direction = Any  # of the parameters' structure


def make_axis(points: int, span: float) -> Float[np.ndarray, " P"]:
    """The coordinates of a grid, with 0 in the middle.

    >>> make_axis(5, 1.0).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]

    Args:
      points: P, an odd number.
      span: The largest coordinate.

    Raises:
      UserError: The number is even or too small, or the span is not positive.
    """
    if points < 3 or points % 2 == 0:
        raise UserError(f"points must be an odd number from 3, so that 0 is one, got {points}")
    if not 0 < span < float("inf"):
        raise UserError(f"the range of a landscape must be positive, got {span}")
    return np.linspace(-span, span, points)


def draw_directions(
    trainable: nnx.State,
    seed: int,
    pair: int,
    *,
    normalize: str = "filter",
    tuning: Tuning | None = None,
) -> tuple[nnx.State, nnx.State]:
    """Two random directions for what trains; where its values are split over devices, likewise.

    A tensor of the same name and shape has the same draws in every model.

    Args:
      trainable: The parameters.
      seed: The seed of all pairs.
      pair: The number of the pair.
      normalize: `filter`; `layer`: each tensor, of each layer, is as long as that of the
        parameters; or `none`.
      tuning: The methods that own the parameters below `tuning`, and their layers.

    Raises:
      UserError: The choice is unknown, or nothing but vectors trains.
    """
    if normalize not in NORMALIZE:
        raise choice_error("normalize", normalize, NORMALIZE)
    flat = nnx.to_flat_state(trainable)
    moves, layers = zip(*(_move(path, variable, tuning) for path, variable in flat), strict=True)
    if not any(move.moves for move in moves):
        raise UserError("nothing trains but biases, scales and other vectors, which do not move")
    values = [variable.get_value() for _, variable in flat]
    found = []
    for number in range(2):
        drawn = [move.draw((seed, pair, number), x) for move, x in zip(moves, values, strict=True)]
        drawn = _normalized(moves, normalize, drawn, values, list(layers))
        drawn = jax.device_put(drawn, [x.sharding for x in values])
        pairs = zip(flat, drawn, strict=True)
        found.append(nnx.from_flat_state([(path, v.replace(d)) for (path, v), d in pairs]))
    return found[0], found[1]


@dataclasses.dataclass(frozen=True)
class _Move:
    """How a tensor moves: its own seed, its axes without those of layers, that along a filter."""

    number: int
    rank: int
    axis: int

    @property
    def moves(self) -> bool:
        return self.rank > 1

    def draw(self, seed: tuple[int, ...], x: Array) -> Array:
        """A draw in the place of a parameter; on the host, as compiling it would take seconds."""
        rng = np.random.default_rng((*seed, self.number))
        drawn = rng.standard_normal(x.shape if self.moves else (), np.float32)
        return jax.device_put(np.broadcast_to(drawn, x.shape), x.sharding)

    def direction(self, d: Array, x: Array, normalize: str, layers: Array | None) -> Array:
        if not self.moves:
            return jnp.zeros_like(x)
        if normalize != "none":
            axes = self.axis if normalize == "filter" else tuple(range(-self.rank, 0))
            d = d / _length(d, axes) * _length(x, axes)
        if layers is None:
            return d
        return jnp.where(layers.reshape(-1, *[1] * (x.ndim - 1)), d, 0)


def _move(path: tuple, variable: nnx.Variable, tuning: Tuning | None) -> tuple[_Move, Array | None]:
    """How a parameter moves, and which of the layers do that it is stacked of."""
    rank, leaf, layers = np.ndim(variable.get_value()), str(path[-1]), None
    axes, by_rows = variable.get_metadata().get("axes"), leaf in TABLES
    if path[:2] == ("tuning", "params") and tuning is not None:
        key, site = path[2], path[3]
        by_rows = leaf in dict(tuning.methods)[key].by_rows
        if num_layers(site, tuning.config):
            rank, layers = rank - 1, tuning.layer_mask(key, site)
    elif axes is not None:
        rank = len(axes)
    number = zlib.crc32(path_name(path).encode())
    return _Move(number, rank, -1 if by_rows else -2), layers


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalized(
    moves: tuple[_Move, ...],
    normalize: str,
    drawn: list[Array],
    values: list[Array],
    layers: list[Array | None],
) -> list[Array]:
    each = zip(moves, drawn, values, layers, strict=True)
    return [move.direction(d, x, normalize, own) for move, d, x, own in each]


def _length(x: Array, axes: int | tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))


def is_scale_invariant(tuning: Tuning) -> bool:
    """Whether some parameters are made orthonormal, so that their lengths mean nothing."""
    return any(
        isinstance(method, Edit) and getattr(method, "orthogonal", False)
        for _, method in tuning.methods
    )


def losses_on_plane(
    loss: Loss,
    parameters: Any,
    data: Any,
    directions: tuple[Direction, Direction],
    axis: Float[np.ndarray, " P"],
    *,
    chunk: int = 16,
    known: Mapping[int, list[float]] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """The losses of a grid, chunk by chunk; point n is `(axis[n // P], axis[n % P])`.

    >>> loss = lambda x, scale: scale * jnp.sum(x["w"] ** 2)
    >>> d1, d2 = ({"w": jnp.array(d)} for d in ([1.0, 0.0], [0.0, 2.0]))
    >>> w = {"w": jnp.zeros(2)}
    >>> found = losses_on_plane(loss, w, 1.0, (d1, d2), make_axis(3, 1.0), chunk=9)
    >>> join_chunks(dict(found), 3).tolist()
    [[5.0, 1.0, 5.0], [4.0, 0.0, 4.0], [5.0, 1.0, 5.0]]

    Args:
      loss: The loss.
      parameters: The centre.
      data: What the loss is of.
      directions: Of a along the rows of the grid, and of b along its columns.
      axis: The coordinates.
      chunk: The most points that one call of the program takes; C is what makes equal chunks.
      known: Losses of chunks by their first point, which are not computed again.

    Yields:
      The number of a chunk's first point and the losses of the chunk.
    """
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    chunk = -(-len(points) // -(-len(points) // chunk))
    for first in range(0, len(points), chunk):
        own = points[first : first + chunk]
        there = (known or {}).get(first, ())
        if len(there) != len(own):
            at = np.pad(own, ((0, chunk - len(own)), (0, 0))).astype(np.float32)
            found = _losses(loss, parameters, data, *directions, at)
            there = np.asarray(found, np.float64)[: len(own)].tolist()
        yield first, list(there)


def join_chunks(chunks: Mapping[int, list[float]], points: int) -> Float[np.ndarray, "P P"]:
    """The losses of a grid from those of its chunks by their first points."""
    flat = [value for first in sorted(chunks) for value in chunks[first]]
    return np.asarray(flat, np.float64).reshape(points, points)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    loss: Loss, parameters: Any, data: Any, d1: Direction, d2: Direction, at: Float[Array, "C 2"]
) -> Float[Array, " C"]:
    def one(place: Array) -> Array:
        move = lambda x, u, v: x + place[0] * u + place[1] * v  # noqa: E731
        return loss(jax.tree.map(move, parameters, d1, d2), data)

    return jax.lax.map(one, at)


@functools.partial(jax.jit, static_argnums=0)
def _curvature(
    loss: Loss, parameters: Any, data: Any, d1: Direction, d2: Direction
) -> Float[Array, "2 2"]:
    def product(x: Any, y: Any) -> Array:
        return sum(map(jnp.vdot, *map(jax.tree.leaves, (x, y))), jnp.zeros(()))

    def slope(x: Any, d: Direction) -> Array:
        return product(jax.grad(loss)(x, data), d)

    def bend(d: Direction) -> Array:
        # Backward twice: what has a backward pass of its own has no forward derivative.
        h = jax.grad(slope)(parameters, d)
        return jnp.stack([product(other, h) for other in (d1, d2)])

    return jax.lax.map(bend, jax.tree.map(lambda *x: jnp.stack(x), d1, d2))


def curvature(
    loss: Loss, parameters: Any, data: Any, directions: tuple[Direction, Direction]
) -> Float[np.ndarray, "2 2"]:
    """`d' H d` of a pair of directions with the Hessian H of the loss, which is never made.

    >>> loss = lambda x, _: 0.5 * jnp.sum(x**2)
    >>> curvature(loss, jnp.zeros(2), None, (jnp.array([1.0, 0.0]), jnp.array([1.0, 3.0]))).tolist()
    [[1.0, 1.0], [1.0, 10.0]]

    Args:
      loss: The loss, twice differentiable.
      parameters: The centre.
      data: What the loss is of.
      directions: The pair.
    """
    return np.asarray(_curvature(loss, parameters, data, *directions), np.float64)


def flatness(losses: Float[np.ndarray, "P P"], axis: Float[np.ndarray, " P"]) -> dict[str, Any]:
    """Numbers of a surface; losses that are not finite are higher than all others.

    >>> axis = make_axis(9, 1.0)
    >>> flatness(1 + axis[:, None] ** 2 + 3 * axis[None] ** 2, axis)["maximum_near"]
    1.1875

    Args:
      losses: The losses of the grid.
      axis: Its coordinates.

    Returns:
      `centre`; `share_twice` and `share_above`, the shares of the grid that are at most twice the
      centre, and at most `ABOVE` more than it; `maximum_near`, the largest loss within `RADIUS`
      (None where no other point is, or it is not finite); and `not_finite`, how many losses are no
      numbers.
    """
    middle = len(axis) // 2
    finite = np.isfinite(losses)
    filled = np.where(finite, losses, np.inf)
    centre = filled[middle, middle]
    near = np.hypot(axis[:, None], axis[None]) <= RADIUS + 1e-9
    highest = filled[near].max()
    return {
        "centre": float(centre),
        "share_twice": float((filled <= 2 * centre).mean()),
        "share_above": float((filled <= centre + ABOVE).mean()),
        "maximum_near": float(highest) if near.sum() > 1 and np.isfinite(highest) else None,
        "not_finite": int((~finite).sum()),
    }
