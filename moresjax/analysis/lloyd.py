"""k-means over more states than fit into memory: Lloyd's iterations, compiled, piece by piece.

All devices of the process take part: a piece is split over them by rows, and their sums are added
up. Centres move as in scikit-learn's `KMeans`: a cluster without states takes the state that is
farthest from its centre, and iterations end when no state changes its cluster or centres move by
less than a tolerance.

Axis legend: N states, M states of a piece, D hidden size, K clusters.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moresjax.analysis.state_rows import StateRows

MAX_ITERATIONS = 5_000
TOLERANCE = 1e-4  # of squared movement, as a share of the features' mean variance
SAMPLE = 20_000  # states that the first centres are drawn from
HELD_BYTES = 1 << 31  # states of fewer bytes stay on the devices between iterations
BLOCK_BYTES = 1 << 22  # states that one device reads at a time for its two products
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Clusters:
    """What `lloyd` has found.

    Attributes:
      centers: The clusters' means `[K, D]`.
      labels: The cluster of each state `[N]`.
      iterations: How many times all states were read.
    """

    centers: Float[np.ndarray, "K D"]
    labels: Int[np.ndarray, " N"]
    iterations: int


def first_centers(rows: StateRows, clusters: int, seed: int) -> Float[np.ndarray, "K D"]:
    """Centres drawn by k-means++ (Arthur & Vassilvitskii 2007) from a sample of the states.

    Args:
      rows: The states.
      clusters: K.
      seed: The seed of the draws.
    """
    from sklearn.cluster import kmeans_plusplus

    rng = np.random.default_rng(seed)
    count = min(len(rows), max(SAMPLE, clusters))
    sample = rows.take(np.sort(rng.choice(len(rows), count, replace=False)))
    return kmeans_plusplus(sample, clusters, random_state=seed)[0]


def lloyd(
    rows: StateRows,
    centers: Float[np.ndarray, "K D"],
    *,
    max_iterations: int = MAX_ITERATIONS,
    chunk_rows: int | None = None,
) -> Clusters:
    """k-means from given centres.

    >>> states = np.array([[0.0], [1.0], [10.0], [11.0]])
    >>> found = lloyd(StateRows(states), np.array([[0.0], [1.0]]))
    >>> found.centers.ravel().tolist(), found.labels.tolist()
    ([0.5, 10.5], [0, 0, 1, 1])

    Args:
      rows: The states.
      centers: The first centres.
      max_iterations: Iterations end after so many.
      chunk_rows: The most states of a piece; default: 256 MiB of them.

    Raises:
      UserError: A state is not finite.
    """
    mean, variance = rows.moments()
    pieces = Pieces(rows, mean, chunk_rows)
    tolerance = TOLERANCE * float(variance.mean())
    centers, previous = np.asarray(centers, np.float64), None
    number, done = 0, False
    while number < max_iterations and not done:
        number += 1
        sums, counts, labels, distances = pieces.assign(centers)
        if (counts == 0).any():
            _move_empty(rows, sums, counts, labels, distances)
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        change, centers = float(((moved - centers) ** 2).sum()), moved
        if previous is not None and np.array_equal(labels, previous):
            return Clusters(centers.astype(np.float32), labels, number)
        done, previous = change <= tolerance, labels
    return Clusters(centers.astype(np.float32), pieces.assign(centers)[2], number)


class Pieces:
    """The states of k-means on the devices, piece by piece.

    Args:
      rows: The states.
      mean: Their mean, from which distances are counted so that they keep their digits.
      chunk_rows: The most states of a piece.
    """

    def __init__(
        self, rows: StateRows, mean: Float[np.ndarray, " D"], chunk_rows: int | None = None
    ) -> None:
        devices = jax.local_devices()
        self._rows, self._mean = rows, mean
        self._sharding = NamedSharding(Mesh(np.asarray(devices), ("rows",)), PartitionSpec("rows"))
        wanted = min(chunk_rows or rows.chunk_rows, len(rows))
        cpu = (
            jax.default_backend() == "cpu"
        )  # others need no cache of their own, but large products
        block = max(BLOCK_BYTES // (4 * rows.size), 8) if cpu else wanted
        self._block = min(block, -(-wanted // len(devices)))
        whole = self._block * len(devices)
        self._chunk = -(-wanted // whole) * whole
        held = 4 * len(rows) * rows.size <= HELD_BYTES
        self._held = list(self._read()) if held else None

    def _read(self) -> Iterator[tuple[Array, Array, int]]:
        """Pieces of one size, their squared distances from the mean, and how many rows count."""
        for chunk in self._rows.chunks(self._chunk):
            count = len(chunk)
            padded = np.zeros((self._chunk, self._rows.size), np.float32)
            padded[:count] = chunk
            piece = jax.device_put(padded, self._sharding)
            yield piece, _squares(piece, self._mean), count

    def assign(
        self, centers: Float[np.ndarray, "K D"]
    ) -> tuple[
        Float[np.ndarray, "K D"],
        Float[np.ndarray, " K"],
        Int[np.ndarray, " N"],
        Float[np.ndarray, " N"],
    ]:
        """Sums and counts of the clusters, each state's cluster and squared distance from it."""
        shifted = centers - self._mean
        bias = (shifted**2).sum(1) / 2 + shifted @ self._mean
        given = jnp.asarray(shifted, jnp.float32), jnp.asarray(bias, jnp.float32)
        sums, counts = np.zeros(centers.shape), np.zeros(len(centers))
        labels, distances = [], []
        for piece, squares, count in self._held or self._read():
            options = {"count": count, "block": self._block, "mesh": self._sharding.mesh}
            own = _assign(piece, squares, *given, **options)
            sums += np.asarray(own[0], np.float64)
            counts += np.asarray(own[1], np.float64)
            labels.append(np.asarray(own[2])[:count])
            distances.append(np.asarray(own[3])[:count])
        return sums, counts, np.concatenate(labels), np.concatenate(distances)


@jax.jit
def _squares(piece: Float[Array, "M D"], mean: Float[Array, " D"]) -> Float[Array, " M"]:
    return jnp.square(piece - mean).sum(1)


@functools.partial(jax.jit, static_argnames=("count", "block", "mesh"))
def _assign(
    piece: Float[Array, "M D"],
    squares: Float[Array, " M"],
    shifted: Float[Array, "K D"],
    bias: Float[Array, " K"],
    *,
    count: int,
    block: int,
    mesh: Mesh,
) -> tuple[Array, Array, Array, Array]:
    """Sums and counts of the clusters of a piece, and each state's cluster and distance."""
    weight = (jnp.arange(len(piece)) < count).astype(piece.dtype)
    split, whole = PartitionSpec("rows"), PartitionSpec()
    function = jax.shard_map(
        functools.partial(_assign_blocks, block=block),
        mesh=mesh,
        in_specs=(split, split, split, whole, whole),
        out_specs=(whole, whole, split, split),
        check_vma=False,
    )
    return function(piece, squares, weight, shifted, bias)


def _assign_blocks(
    piece: Float[Array, "M D"],
    squares: Float[Array, " M"],
    weight: Float[Array, " M"],
    shifted: Float[Array, "K D"],
    bias: Float[Array, " K"],
    *,
    block: int,
) -> tuple[Array, Array, Array, Array]:
    """`_assign` on one device, block by block: the second product finds its states in the cache."""
    clusters, size = shifted.shape

    def add(total: tuple[Array, Array], given: tuple[Array, ...]) -> tuple[Any, Any]:
        z, square, own = given
        score = jnp.dot(z, shifted.T, precision=HIGHEST) - bias
        label = score.argmax(1)
        member = (label[:, None] == jnp.arange(clusters)) * own[:, None]
        sums = total[0] + jnp.dot(member.T, z, precision=HIGHEST)
        return (sums, total[1] + member.sum(0)), (label, square - 2 * score.max(1))

    blocks = piece.reshape(-1, block, size), squares.reshape(-1, block), weight.reshape(-1, block)
    start = jnp.zeros((clusters, size)), jnp.zeros(clusters)
    (sums, counts), (labels, distances) = jax.lax.scan(add, start, blocks)
    distances = jnp.maximum(distances.reshape(-1), 0)
    return jax.lax.psum(sums, "rows"), jax.lax.psum(counts, "rows"), labels.reshape(-1), distances


def _move_empty(
    rows: StateRows,
    sums: Float[np.ndarray, "K D"],
    counts: Float[np.ndarray, " K"],
    labels: Int[np.ndarray, " N"],
    distances: Float[np.ndarray, " N"],
) -> None:
    """Gives every empty cluster the farthest state that is left, which leaves its own; in place."""
    empty = np.flatnonzero(counts == 0)
    if not distances.max() > 0:
        return
    far = np.argsort(-distances, kind="stable")[: len(empty)]
    for cluster, number, state in zip(empty, far, rows.take(far), strict=True):
        old = labels[number]
        sums[old] -= state
        counts[old] -= 1
        sums[cluster], counts[cluster] = state, 1
