"""Batches of samples that are about equally long and are all with or all without images.

Axis legend: n samples, B rows of the global batch.

LLaVA groups by modality and length in the same way: each kind is shuffled, cut into runs, sorted
inside of them and cut into batches; then the batches are shuffled. A batch is padded to the
shortest of a few fixed lengths that holds it, so a train step is compiled once for each.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError
from moresjax.data.rows import PADDING_SAMPLE


def plan_batches(
    sizes: Int[np.ndarray, "n 2"], batch_size: int, sorted_together: int, rng: np.random.Generator
) -> Int[np.ndarray, "batches B"]:
    """The sample numbers of every batch of an epoch; each sample is in exactly one.

    Args:
      sizes: The words and images of every sample.
      batch_size: B; the last batch of each kind is filled up with `PADDING_SAMPLE`.
      sorted_together: How many samples are sorted together, rounded up to whole batches.
      rng: Shuffles samples and batches.
    """
    run = -(-sorted_together // batch_size) * batch_size
    batches = []
    for kind in (sizes[:, 1] > 0, sizes[:, 1] == 0):
        order = rng.permutation(np.flatnonzero(kind))
        for start in range(0, len(order), run):
            samples = order[start : start + run]
            samples = samples[np.argsort(-sizes[samples, 0], kind="stable")]
            padding = np.full(-len(samples) % batch_size, PADDING_SAMPLE)
            batches.append(np.concatenate([samples, padding]).reshape(-1, batch_size))
    return rng.permutation(np.concatenate(batches)).astype(np.int64)


def bucket_lengths(max_seq_len: int, buckets: Sequence[int]) -> tuple[int, ...]:
    """Row lengths in rising order, the last of them `max_seq_len`.

    >>> bucket_lengths(2048, ())
    (512, 1024, 1536, 2048)
    >>> bucket_lengths(1000, (512, 768, 1024))
    (512, 768, 1000)

    Args:
      max_seq_len: The number of tokens that a row may have.
      buckets: The other lengths, of which those beyond `max_seq_len` hold nothing more than it does
        and are left out; where none is left, the quarters of `max_seq_len`.

    Raises:
      UserError: A length is below 1.
    """
    if any(bucket < 1 for bucket in buckets):
        raise UserError(f"buckets {tuple(buckets)} must be at least 1")
    chosen = [bucket for bucket in buckets if bucket <= max_seq_len]
    chosen = chosen or [-(-max_seq_len * quarters // 4) for quarters in (1, 2, 3)]
    return tuple(sorted({*chosen, max_seq_len}))


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """The samples of all batches of all epochs; batch i is a function of (seed, i).

    Attributes:
      sizes: The words and images of every sample `[n, 2]`.
      batch_size: B, the number of rows of the global batch.
      sorted_together: How many samples are sorted together by their length.
      seed: Seeds the shuffling.
    """

    sizes: np.ndarray
    batch_size: int
    sorted_together: int
    seed: int

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """How many batches show every sample once."""
        return len(self._epoch(0))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_batches(self.sizes, self.batch_size, self.sorted_together, rng)

    def batches_until(self, samples: int) -> int:
        """How many batches, from the first, show so many samples in all."""
        passes, left = divmod(samples, len(self.sizes))
        shown = np.cumsum((self._epoch(passes) != PADDING_SAMPLE).sum(axis=1)) if left else ()
        return passes * self.batches_per_epoch + int(np.searchsorted(shown, left) + bool(left))

    def __call__(self, number: int) -> list[int]:
        """The numbers of the samples of a batch; `PADDING_SAMPLE` stands for none."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return self._epoch(epoch)[place].tolist()
