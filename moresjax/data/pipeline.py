"""From a source to an iterator of batches, with Grain.

Axis legend: B rows of the global batch, b rows of this process, S tokens, N images per row.

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
from moresjax.core.layout import Batch, RowStructure
from moresjax.core.row import stack
from moresjax.data.buckets import BatchPlan, bucket_lengths
from moresjax.data.packing import PackWindow
from moresjax.data.processor import Processor
from moresjax.data.rows import Collate, RowReader
from moresjax.data.skipping import SkipPolicy
from moresjax.data.sources import Source, sizes_of

BATCHING = ("pad", "pack", "bucket")
PACK_WINDOW = 256  # samples packed together
SORTED_BATCHES = 32  # batches whose samples are sorted together
MEASURED_WINDOWS = 16  # packed to measure how many samples share a row
ENDLESS = 1 << 62


class Batches:
    """An endless iterator over stacked rows of this process's share.

    Attributes:
      skip_policy: What happens to bad samples; it lists those that were skipped.
      structure: A guarantee about the rows of every batch.
    """

    def __init__(
        self, dataset: grain.IterDataset, skip_policy: SkipPolicy, structure: RowStructure
    ) -> None:
        self.skip_policy, self.structure = skip_policy, structure
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
          UserError: The state was saved before processes shared one order.
        """
        if "position" not in state:
            raise UserError(
                "the position in the data was saved by an older version of moresjax, whose "
                "processes each had an order of their own; this version cannot go on from it"
            )
        self._iterator.set_state(state["position"])


def structure_for(source: object, batching: str) -> RowStructure:
    """The guarantee about the rows of a source's batches; `source` may be its class.

    It is known before any row is read, so that the program is the same at every step and in every
    process.
    """
    if getattr(source, "branches", True):
        return RowStructure.ANY
    return RowStructure.PACKED if batching == "pack" else RowStructure.SINGLE


def make_iterator(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    max_seq_len: int,
    images_per_row: int = 0,
    seed: int = 0,
    num_workers: int = 1,
    batching: str = "pad",
    pack_window: int = 0,
    buckets: Sequence[int] = (),
    on_bad_sample: str = "raise",
) -> Batches:
    """An endless, shuffled iterator over stacked rows of this process's share.

    >>> from moresjax.data.digits import build_tokenizer
    >>> from moresjax.data.sources import make_source
    >>> from moresjax.data.templates import get_template
    >>> source = make_source("digits", task="text")
    >>> processor = Processor(build_tokenizer(), get_template("bare"))
    >>> batches = make_iterator(source, processor, batch_size=4, max_seq_len=96)
    >>> next(batches)["tokens"].shape
    (4, 96)

    Args:
      source: The samples.
      processor: Turns samples into rows.
      batch_size: B, the global batch size; each process gets its share of it.
      max_seq_len: S, the number of tokens per row.
      images_per_row: N, the number of images per row; 0 for text.
      seed: Seeds the shuffling.
      num_workers: The number of reading threads.
      batching: `pad` (a sample per row), `pack` (several samples per row) or `bucket` (a sample per
        row; rows of a batch are about equally long).
      pack_window: How many samples are packed together, or sorted together for buckets; 0:
        `PACK_WINDOW` samples, or `SORTED_BATCHES` batches.
      buckets: The lengths of rows in buckets; `()`: the quarters of `max_seq_len`.
      on_bad_sample: `raise` ends the run at a sample that cannot be used, `skip` goes on.

    Raises:
      UserError: A choice is unknown, or the source cannot be batched so.
    """
    if batching not in BATCHING:
        raise choice_error("batching", batching, BATCHING)
    own, skip_policy = _own_rows(batch_size), SkipPolicy(on_bad_sample, len(source))
    reader = RowReader(source, processor, max_seq_len, images_per_row, skip_policy, num_workers)
    if batching == "bucket":
        plan = bucket_plan(source, batch_size, pack_window, seed)
        collate = Collate(reader, bucket_lengths(max_seq_len, buckets), own)
        dataset = _planned(plan, ENDLESS, collate)
    elif batching == "pack":
        dataset = _packed(reader, batch_size, pack_window or PACK_WINDOW, seed, own)
    else:
        dataset = _padded(reader, batch_size, seed, own)
    return Batches(dataset, skip_policy, structure_for(source, batching))


def bucket_plan(source: Source, batch_size: int, pack_window: int, seed: int) -> BatchPlan:
    """The samples of every batch with batching `bucket`; the arguments are `make_iterator`'s.

    Raises:
      UserError: The source has weights, or does not know the lengths of its samples.
    """
    if getattr(source, "mixture_weights", ()):
        raise UserError("batching 'bucket' takes no data weights; use 'pad' or 'pack'")
    sorted_together = pack_window or SORTED_BATCHES * batch_size
    return BatchPlan(sizes_of(source), batch_size, sorted_together, seed)


def one_epoch(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    max_seq_len: int,
    images_per_row: int = 0,
    row_length: int = 0,
    seed: int = 0,
    num_workers: int = 1,
    max_batches: int = 0,
    on_bad_sample: str = "raise",
) -> grain.IterDataset:
    """Stacked rows of this process's share that show every sample once, in random order.

    All batches have one shape, with a sample per row; rows of padding fill up the last batch and
    stand for samples that are skipped.

    Args:
      source: The samples.
      processor: Turns samples into rows.
      batch_size: B, the global batch size; each process gets its share of it.
      max_seq_len: The number of tokens that a sample may have.
      images_per_row: N, the number of images per row; 0 for text.
      row_length: S, the number of tokens per row; 0: `max_seq_len`.
      seed: Seeds the order.
      num_workers: The number of reading threads.
      max_batches: Stops after so many batches; 0: shows all samples.
      on_bad_sample: `raise` ends the run at a sample that cannot be used, `skip` goes on.

    Raises:
      UserError: A choice is unknown.
    """
    skip_policy = SkipPolicy(on_bad_sample, len(source))
    reader = RowReader(source, processor, max_seq_len, images_per_row, skip_policy, num_workers)
    # All sizes are alike, so that nothing is sorted by length.
    sizes = np.full((len(source), 2), min(images_per_row, 1))
    plan = BatchPlan(sizes, batch_size, len(source), seed)
    lengths = (row_length or max_seq_len,)
    collate = Collate(reader, lengths, _own_rows(batch_size), always_pixels=True)
    count = min(max_batches or plan.batches_per_epoch, plan.batches_per_epoch)
    return _planned(plan, count, collate)


def _planned(plan: BatchPlan, count: int, collate: Collate) -> grain.IterDataset:
    """The first batches of a plan."""
    texts = grain.MapDataset.range(count).map(plan).map(collate.reader.documents)
    return texts.map(collate).to_iter_dataset(_read_options(collate.reader, collate.own))


def _packed(
    reader: RowReader, batch_size: int, pack_window: int, seed: int, own: slice
) -> grain.IterDataset:
    """Endless batches of rows that several samples share."""
    windows, pack = _windows(reader, pack_window, seed)
    ahead = windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    rows = grain.experimental.FlatMapIterDataset(ahead, pack)
    collate = Collate(reader, (reader.max_seq_len,), own)
    return rows.batch(batch_size, batch_fn=list).map(collate)


def _windows(reader: RowReader, pack_window: int, seed: int) -> tuple[grain.MapDataset, PackWindow]:
    """Endless windows of documents, and what turns each of them into rows."""
    order = _shuffled(reader.source, seed)
    windows = order.batch(pack_window, drop_remainder=True, batch_fn=list).map(reader.documents)
    pack = PackWindow(reader.processor.count_images, reader.max_seq_len, reader.images_per_row)
    return windows, pack


def samples_per_row(
    source: Source,
    processor: Processor,
    *,
    max_seq_len: int,
    images_per_row: int = 0,
    seed: int = 0,
    num_workers: int = 1,
    pack_window: int = 0,
    on_bad_sample: str = "raise",
) -> float:
    """How many samples share a row with batching `pack`, measured on the run's first windows.

    Samples that are skipped count; images are not read. The arguments are `make_iterator`'s.
    """
    skip_policy = SkipPolicy(on_bad_sample, len(source))
    reader = RowReader(source, processor, max_seq_len, images_per_row, skip_policy, num_workers)
    size = pack_window or PACK_WINDOW
    windows, pack = _windows(reader, size, seed)
    count = min(-(-len(source) // size), MEASURED_WINDOWS)
    rows = sum(len(pack.flat_map(windows[number] or ())) for number in range(count))
    return count * size / max(rows, 1)


def _padded(reader: RowReader, batch_size: int, seed: int, own: slice) -> grain.IterDataset:
    """Endless batches with a sample per row."""
    # Nobody knows the others' rows here, so that all have pixels where one may have an image.
    always_pixels = jax.process_count() > 1

    def read(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        batch = stack(reader.padded(numbers[own]))
        if not always_pixels and "image" in batch and (batch["image"] < 0).all():
            batch.pop("pixels", None)
        return batch

    order = _shuffled(reader.source, seed)
    batches = order.batch(batch_size, drop_remainder=True, batch_fn=list).map(read)
    return batches.to_iter_dataset(_read_options(reader, own))


def _own_rows(batch_size: int) -> slice:
    """Which rows of a batch belong to this process."""
    count, index = jax.process_count(), jax.process_index()
    if batch_size % count:
        raise UserError(f"batch_size {batch_size} does not divide into {count} processes")
    own = batch_size // count
    return slice(index * own, (index + 1) * own)


def _read_options(reader: RowReader, own: slice) -> grain.ReadOptions:
    """Reads as many batches at once as keep all workers busy with their rows."""
    batches = -(-reader.num_workers // (own.stop - own.start)) + 1
    return grain.ReadOptions(num_threads=batches, prefetch_buffer_size=batches)


def _shuffled(source: Source, seed: int) -> grain.MapDataset:
    """Sample numbers of endless epochs in random order, or of a weighted mixture."""
    numbers = grain.MapDataset.range(len(source))
    mixture = getattr(source, "mixture_weights", ())
    if not mixture:
        return numbers.shuffle(seed=seed).repeat()
    components = [
        numbers.slice(indices).shuffle(seed=seed + number).repeat()
        for number, (indices, _) in enumerate(mixture)
    ]
    return grain.MapDataset.mix(components, [weight for _, weight in mixture])


def to_device_batch(
    stacked: Mapping[str, Any],
    processor: Processor,
    sharding: jax.sharding.Sharding | None = None,
    structure: RowStructure = RowStructure.ANY,
) -> Batch | dict[str, Any]:
    """Stacked rows as the objective's input, on the devices of a sharding.

    Args:
      stacked: The arrays `[b, ...]` of this process's rows, by name.
      processor: Makes a `Batch` of them; ready-made rows stay a dict.
      sharding: Splits the leading axis over devices; None: the default device holds everything.
      structure: A guarantee about every row.
    """
    batch = processor.to_batch(stacked, structure) if "tokens" in stacked else dict(stacked)
    if sharding is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
