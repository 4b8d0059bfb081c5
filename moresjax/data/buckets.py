"""Batches of samples that are about equally long and are all with or all without images.

Axis legend: n samples, B rows of the global batch.

As LLaVA's grouping by modality and length: each kind is shuffled, cut into windows, sorted inside
of them and cut into batches; then the batches are shuffled. A batch is padded to the shortest of a
few fixed lengths that holds it, so a train step is compiled once for each.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError
from moresjax.data.rows import PADDING_SAMPLE


def plan_batches(
    sizes: Int[np.ndarray, "n 2"], batch_size: int, window: int, rng: np.random.Generator
) -> Int[np.ndarray, "batches B"]:
    """Sample numbers of every batch of an epoch; each sample is in exactly one.

    Args:
      sizes: words and images of every sample.
      batch_size: B; the last batch of each kind is filled up with `PADDING_SAMPLE`.
      window: samples that are sorted together, rounded up to whole batches.
      rng: of the shuffling.
    """
    window = -(-window // batch_size) * batch_size
    batches = []
    for chosen in (sizes[:, 1] > 0, sizes[:, 1] == 0):
        order = rng.permutation(np.flatnonzero(chosen))
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(-sizes[part, 0], kind="stable")]
            fill = np.full(-len(part) % batch_size, PADDING_SAMPLE)
            batches.append(np.concatenate([part, fill]).reshape(-1, batch_size))
    return rng.permutation(np.concatenate(batches)).astype(np.int64)


def bucket_lengths(length: int, buckets: Sequence[int]) -> tuple[int, ...]:
    """Row lengths in rising order, the last of them `length`; by default its quarters.

    Raises:
      UserError: for a length below 1 or above `length`.
    """
    if any(not 1 <= bucket <= length for bucket in buckets):
        raise UserError(f"buckets {tuple(buckets)} must be between 1 and the length {length}")
    chosen = buckets or [-(-length * part // 4) for part in (1, 2, 3)]
    return tuple(sorted({*chosen, length}))


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
    """Random access to the samples of all epochs' batches; item i is a function of (seed, i).

    Attributes:
      sizes: words and images of every sample `[n, 2]`.
      batch_size: B.
      window: samples that are sorted together.
      seed: of the shuffling.
    """

    sizes: np.ndarray
    batch_size: int
    window: int
    seed: int

    @functools.cached_property
    def per_epoch(self) -> int:
        return len(self._plan(0))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _plan(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_batches(self.sizes, self.batch_size, self.window, rng)

    def __call__(self, number: int) -> list[int]:
        """Numbers of the samples of batch `number`, or `PADDING_SAMPLE`."""
        epoch, place = divmod(number, self.per_epoch)
        return self._plan(epoch)[place].tolist()
