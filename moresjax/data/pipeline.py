"""From a source to an iterator of batches, with Grain.

All processes agree on one order of batches, and each makes its own rows of them. The iterator's
state is a small JSON value that says how far the run has come. It goes into the checkpoint, so a
resumed run sees exactly the batches that an uninterrupted one would, with any number of processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import RowStructure
from moresjax.core.row import stack
from moresjax.data.bad import BadSamples
from moresjax.data.buckets import Buckets, bucket_lengths
from moresjax.data.packing import PackWindow
from moresjax.data.processor import Processor
from moresjax.data.rows import Collate, Rows
from moresjax.data.sources import Source, sizes_of

BATCHING = ("pad", "pack", "bucket")
PACK_WINDOW = 256  # samples packed together
BUCKET_WINDOW = 32  # batches sorted together
ENDLESS = 1 << 62


class Batches:
    """An endless iterator over stacked rows of this process's share.

    Attributes:
      batching: how samples became rows.
      bad: the samples that were skipped.
      structure: what the rows of every batch hold.
    """

    def __init__(
        self, dataset: grain.IterDataset, batching: str, bad: BadSamples, structure: RowStructure
    ):
        self.batching, self.bad, self.structure = batching, bad, structure
        self._iterator = iter(dataset)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Where the run stands: the same in every process, however many there are."""
        return {"position": self._iterator.get_state()}

    def set_state(self, state: Mapping) -> None:
        """Goes on from a state, which any number of processes may have saved.

        Raises:
          UserError: when it was saved before processes shared one order.
        """
        if "position" not in state:
            raise UserError(
                "the position in the data was saved by an older version of moresjax, whose "
                "processes each had an order of their own; this version cannot go on from it"
            )
        self._iterator.set_state(state["position"])


def structure_for(source, batching: str) -> RowStructure:
    """What the rows of a source's batches hold; `source` may be its class.

    Known before any is read: the program is the same at every step and in every process.
    """
    if getattr(source, "branches", True):
        return RowStructure.ANY
    return RowStructure.PACKED if batching == "pack" else RowStructure.SINGLE


def make_iterator(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    length: int,
    images: int = 0,
    seed: int = 0,
    threads: int = 1,
    batching: str = "pad",
    window: int = 0,
    buckets: Sequence[int] = (),
    on_bad_sample: str = "raise",
) -> Batches:
    """An endless, shuffled iterator over stacked rows of this process's share.

    Args:
      source: the samples.
      processor: how they become rows.
      batch_size: global batch size; each process gets its share of it.
      length: S, tokens per row.
      images: N, images per row; 0 for text.
      seed: of the shuffling.
      threads: reading threads.
      batching: `pad` (a sample per row), `pack` (several samples per row) or `bucket` (a sample per
        row; rows of a batch are about equally long).
      window: samples that are packed together, or sorted together in buckets; 0: `PACK_WINDOW`
        samples, or `BUCKET_WINDOW` batches.
      buckets: lengths of rows in buckets; `()`: quarters of `length`.
      on_bad_sample: `raise` or `skip`.

    Raises:
      UserError: for an unknown choice, or a source that cannot be batched so.
    """
    if batching not in BATCHING:
        raise choice_error("batching", batching, BATCHING)
    own, structure = _own_rows(batch_size), structure_for(source, batching)
    bad = BadSamples(on_bad_sample, len(source))
    rows = Rows(source, processor, length, images, bad, threads)
    reading = _reading(threads, own)
    if batching == "bucket":
        if getattr(source, "shares", ()):
            raise UserError("batching 'bucket' takes no data weights; use 'pad' or 'pack'")
        window = window or BUCKET_WINDOW * batch_size
        plan = Buckets(sizes_of(source), batch_size, window, seed)
        collate = Collate(rows, bucket_lengths(length, buckets), own)
        numbers = grain.MapDataset.range(ENDLESS).map(plan)
        batches = numbers.map(rows.texts).map(collate).to_iter_dataset(reading)
        return Batches(batches, batching, bad, structure)
    order = _shuffled(source, seed)
    if batching == "pack":
        window = window or PACK_WINDOW
        texts = order.batch(window, drop_remainder=True, batch_fn=list).map(rows.texts)
        ahead = texts.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        pack = PackWindow(processor.count_images, length, images)
        planned = grain.experimental.FlatMapIterDataset(ahead, pack)
        batches = planned.batch(batch_size, batch_fn=list).map(Collate(rows, (length,), own))
        return Batches(batches, batching, bad, structure)

    # Nobody knows the others' rows here, so that all have pixels where one may have an image.
    pixels = jax.process_count() > 1

    def padded(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        batch = stack(rows.padded(numbers[own]))
        if not pixels and "image" in batch and (batch["image"] < 0).all():
            batch.pop("pixels", None)
        return batch

    batches = order.batch(batch_size, drop_remainder=True, batch_fn=list).map(padded)
    return Batches(batches.to_iter_dataset(reading), batching, bad, structure)


def epoch(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    length: int,
    images: int = 0,
    row_length: int = 0,
    seed: int = 0,
    threads: int = 1,
    batches: int = 0,
    on_bad_sample: str = "raise",
) -> grain.IterDataset:
    """Stacked rows of this process's share that show every sample once, in random order.

    All batches have one shape, with a sample per row; rows of padding fill up the last batch and
    stand for samples that are skipped.

    Args:
      source, processor, batch_size, images, seed, threads, on_bad_sample: as in `make_iterator`.
      length: tokens that a sample may have.
      row_length: S, tokens per row; 0: as `length`.
      batches: at most so many; 0: all.

    Raises:
      UserError: as `make_iterator`.
    """
    bad, own = BadSamples(on_bad_sample, len(source)), _own_rows(batch_size)
    rows = Rows(source, processor, length, images, bad, threads)
    sizes = np.full((len(source), 2), min(images, 1))  # all alike: nothing is sorted by length
    plan = Buckets(sizes, batch_size, len(source), seed)
    collate = Collate(rows, (row_length or length,), own, pixels=True)
    numbers = grain.MapDataset.range(min(batches or plan.per_epoch, plan.per_epoch)).map(plan)
    return numbers.map(rows.texts).map(collate).to_iter_dataset(_reading(threads, own))


def _own_rows(batch_size: int) -> slice:
    """Which rows of a batch belong to this process."""
    count, index = jax.process_count(), jax.process_index()
    if batch_size % count:
        raise UserError(f"batch_size {batch_size} does not divide into {count} processes")
    own = batch_size // count
    return slice(index * own, (index + 1) * own)


def _reading(threads: int, own: slice) -> grain.ReadOptions:
    """As many batches at once as keep all threads busy with their rows."""
    batches = -(-threads // (own.stop - own.start)) + 1
    return grain.ReadOptions(num_threads=batches, prefetch_buffer_size=batches)


def _shuffled(source: Source, seed: int) -> grain.MapDataset:
    """Sample numbers of endless epochs in random order, or of a mixture with weights."""
    numbers = grain.MapDataset.range(len(source))
    shares = getattr(source, "shares", ())
    if not shares:
        return numbers.shuffle(seed=seed).repeat()
    parts = [
        numbers.slice(part).shuffle(seed=seed + number).repeat()
        for number, (part, _) in enumerate(shares)
    ]
    return grain.MapDataset.mix(parts, [weight for _, weight in shares])


def to_device_batch(
    stacked: Mapping[str, Any],
    processor: Processor,
    sharding=None,
    structure: RowStructure = RowStructure.ANY,
):
    """Stacked rows as the objective's input, on the devices of `sharding` (leading axis split)."""
    batch = processor.to_batch(stacked, structure) if "tokens" in stacked else dict(stacked)
    if sharding is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
