"""States `[N, D]` that are read in pieces, from an array or from a store.

Axis legend: N states, M some of them, D hidden size.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.core.types import AnyArray

CHUNK_BYTES = 1 << 28  # of a piece in fp32


class StateRows:
    """The states of one site and layer that were found, in fp32.

    >>> rows = StateRows(np.arange(6.0).reshape(3, 2))
    >>> len(rows), rows.size, [len(chunk) for chunk in rows.chunks(2)]
    (3, 2, [2, 1])

    Args:
      states: An array, or a store, of which only the states that were found count.
      site: The site in a store; it may be left out where there is only one.
      layer: The layer of the site; likewise.

    Attributes:
      numbers: The places `[N]` of these states in `states`.
      size: D.

    Raises:
      UserError: There is no such site or layer, no state, or the array is no matrix.
    """

    def __init__(
        self, states: States | AnyArray, site: str | None = None, layer: int | None = None
    ) -> None:
        if isinstance(states, States):
            self.numbers = np.flatnonzero(states.found)
            self._source: States | AnyArray = states.take(self.numbers)
            self._key = site, layer
            self.size = states.width(site, layer)
        else:
            if states.ndim != 2:
                raise UserError(f"states are a matrix [N, D], got shape {tuple(states.shape)}")
            self.numbers, self._source = np.arange(len(states)), states
            self.size = states.shape[1]
        if not len(self.numbers):
            raise UserError("there are no states: no sample's state was found")

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def chunk_rows(self) -> int:
        """How many states a piece has by default."""
        return max(CHUNK_BYTES // (4 * self.size), 1)

    def chunks(self, rows: int | None = None) -> Iterator[Float[np.ndarray, "M D"]]:
        """The states in order, some at a time.

        Args:
          rows: The most states of a piece; default: `chunk_rows`.
        """
        rows = rows or self.chunk_rows
        if isinstance(self._source, States):
            for chunk in self._source.chunks(*self._key, rows):
                yield np.asarray(chunk, np.float32)
        else:
            for first in range(0, len(self), rows):
                yield np.asarray(self._source[first : first + rows], np.float32)

    def take(self, rows: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M D"]:
        """Some of the states, by their numbers among those that were found."""
        if isinstance(self._source, States):
            return np.asarray(self._source.take(rows).matrix(*self._key), np.float32)
        return np.asarray(self._source[rows], np.float32)

    def all(self) -> Float[np.ndarray, "N D"]:
        """All states at once."""
        return np.concatenate(list(self.chunks()))

    def moments(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
        """Mean and variance of every feature, added up in fp64.

        Raises:
          UserError: A state is not finite.
        """
        total, squares = np.zeros(self.size), np.zeros(self.size)
        shift, first = np.zeros(self.size, np.float32), 0
        for chunk in self.chunks():
            bad = np.flatnonzero(~np.isfinite(chunk).all(1))
            if len(bad):
                place = int(self.numbers[first + bad[0]])
                raise UserError(f"state {place} is not finite; leave such states out")
            shift = shift if first else chunk[0]  # so that squares lose no digits
            moved = chunk - shift
            total += moved.sum(0, np.float64)
            squares += np.einsum("nd,nd->d", moved, moved, dtype=np.float64)
            first += len(chunk)
        mean = total / len(self)
        return (mean + shift).astype(np.float32), np.maximum(squares / len(self) - mean**2, 0)
