"""Batches of samples that are about equally long and are all with or all without images.

Axis legend: n samples, B rows of the global batch, b rows of this process.

As LLaVA's grouping by modality and length: each kind is shuffled, cut into windows, sorted inside
of them and cut into batches; then the batches are shuffled. A batch is padded to the shortest of a
few fixed lengths that holds it, so a train step is compiled once for each.

All processes must take batches of the same shape, so each of them tokenises the text of the whole
global batch; images are read for its own rows only.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from moresjax.data.processor import FIELDS, Processor, Row
from moresjax.errors import UserError

FILLER = -1  # stands for no sample at the end of the last batch of a kind


def plan_batches(
    sizes: Int[np.ndarray, "n 2"], batch_size: int, window: int, rng: np.random.Generator
) -> Int[np.ndarray, "batches B"]:
    """Sample numbers of every batch of an epoch; each sample is in exactly one.

    Args:
      sizes: words and images of every sample.
      batch_size: B; the last batch of each kind is filled up with `FILLER`.
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
            fill = np.full(-len(part) % batch_size, FILLER)
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
class BucketedBatches:
    """Random access to the batches of all epochs; item i is a function of (seed, i).

    Attributes:
      encode: number of a sample -> its row without pixels, or None for a bad sample.
      load: number of a sample -> its row with pixels, or None for a bad sample.
      processor: pads rows.
      sizes: words and images of every sample `[n, 2]`.
      batch_size: B.
      lengths: of rows, in rising order.
      images: N, images per row; 0 for text.
      window: samples that are sorted together.
      rows: which rows of a batch belong to this process.
      seed: of the shuffling.
    """

    encode: Callable[[int], Row | None]
    load: Callable[[int], Row | None]
    processor: Processor
    sizes: np.ndarray
    batch_size: int
    lengths: tuple[int, ...]
    images: int
    window: int
    rows: slice
    seed: int

    @functools.cached_property
    def per_epoch(self) -> int:
        return len(self._plan(0))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _plan(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_batches(self.sizes, self.batch_size, self.window, rng)

    def __call__(self, number: int) -> Row:
        """The rows of this process of batch `number`, stacked."""
        epoch, place = divmod(number, self.per_epoch)
        members = self._plan(epoch)[place]
        encoded = [None if i == FILLER else self.encode(int(i)) for i in members]
        longest = max((len(row["tokens"]) for row in encoded if row is not None), default=0)
        length = next(bucket for bucket in self.lengths if bucket >= longest)
        images = self.images if (self.sizes[members[members != FILLER], 1] > 0).any() else 0
        padded = []
        for i, row in zip(members[self.rows], encoded[self.rows], strict=True):
            whole = self.load(int(i)) if images and row is not None else row
            whole = self._empty() if whole is None else whole
            padded.append(self.processor.pad(whole, length, images) | {"id": whole["id"]})
        return {key: np.stack([row[key] for row in padded]) for key in padded[0]}

    def _empty(self) -> Row:
        """A row of padding: it has no labels, so the loss does not know it."""
        return {key: np.zeros(0, np.int32) for key in ("tokens", *FIELDS)} | {"id": ""}
