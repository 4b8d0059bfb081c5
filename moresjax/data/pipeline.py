"""From a source to an iterator of batches, with Grain.

Every process reads its own share of the source; the iterator's state is a small JSON value that
goes into the checkpoint, so a resumed run sees exactly the batches that an uninterrupted one would.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from moresjax.data.bad import BadSamples
from moresjax.data.buckets import BucketedBatches, bucket_lengths
from moresjax.data.packing import PackWindow
from moresjax.data.processor import Processor, Row
from moresjax.data.samples import Sample
from moresjax.data.sources import Source, sizes_of
from moresjax.errors import UserError, choice_error
from moresjax.layout import Holds

BATCHING = ("pad", "pack", "bucket")
PACK_WINDOW = 256  # samples packed together
BUCKET_WINDOW = 32  # batches sorted together
ENDLESS = 1 << 62


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to the rows of a source; None stands for a bad sample that is skipped.

    Attributes:
      source: the samples.
      processor: how they become rows.
      length: S, tokens that a row may have.
      images: N, images that it may have.
      bad: what becomes of bad samples.
      padded: whether rows are padded to `length` and `images`.
    """

    source: Source
    processor: Processor
    length: int
    images: int
    bad: BadSamples
    padded: bool = True

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row | None:
        return self.bad.guard(index, lambda: self._row(self.source[index]))

    def _row(self, element: Sample | Mapping[str, Any]) -> Row:
        """Ready-made rows only have their images normalised."""
        if not isinstance(element, Sample) and self.padded:
            return dict(element) | {"pixels": self.processor.image(element["pixels"])}
        self._check(element)
        row = self.processor.row(element)
        self.processor.check_fit(row, self.length, self.images, element.id)
        if self.padded:
            row = self.processor.pad(row, self.length, self.images, element.id)
        return row | {"id": element.id}

    def text(self, index: int) -> Row | None:
        """The row of a sample without its pixels."""

        def make() -> Row:
            sample = self.source[index]
            self._check(sample)
            row = self.processor.text_row(sample)
            self.processor.check_fit(row, self.length, self.images, sample.id)
            return row | {"id": sample.id}

        return self.bad.guard(index, make)

    def _check(self, element: Sample | Mapping[str, Any]) -> None:
        if not isinstance(element, Sample):
            raise UserError(f"ready-made rows ({element['id']}) need batching 'pad'")


class Batches:
    """An endless iterator over stacked rows of this process's share.

    Attributes:
      batching: how samples became rows.
      bad: the samples that were skipped.
      holds: what the rows of every batch hold.
    """

    def __init__(self, dataset: grain.IterDataset, batching: str, bad: BadSamples, holds: Holds):
        self.batching, self.bad, self.holds = batching, bad, holds
        self._iterator = iter(dataset)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Row:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Where every process stands; all processes must ask for it together."""
        return {"processes": _everywhere(self._iterator.get_state())}

    def set_state(self, state: Mapping) -> None:
        """Goes on from a state.

        Raises:
          UserError: when another number of processes saved it and they stood at different places.
        """
        states, count = state["processes"], jax.process_count()
        if len(states) == count:
            own = states[jax.process_index()]
        elif self.batching != "pack" and all(other == states[0] for other in states):
            own = dict(states[0])
            if self.batching == "pad":  # counts the samples of one process; buckets count batches
                own["next_index"] = own["next_index"] * len(states) // count
        else:
            raise UserError(
                f"{len(states)} processes read this run's data and stood at different places; "
                f"it cannot go on with {count}"
            )
        self._iterator.set_state(own)


def rows_held(source, batching: str) -> Holds:
    """What the rows of a source's batches hold; `source` may be its class.

    Known before any is read: the program is the same at every step and in every process.
    """
    if getattr(source, "branches", True):
        return Holds.ANY
    return Holds.PACKED if batching == "pack" else Holds.SINGLE


def _everywhere(state: dict) -> list[dict]:
    """The states of all processes, in their order."""
    if jax.process_count() == 1:
        return [state]
    data = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size))
    padded = np.pad(data, (0, int(sizes.max()) - data.size))
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(x[:n])) for x, n in zip(gathered, sizes, strict=True)]


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
    own, holds = _own_rows(batch_size), rows_held(source, batching)
    bad = BadSamples(on_bad_sample, len(source))
    rows = Rows(source, processor, length, images, bad, padded=batching == "pad")
    if batching == "bucket":
        if getattr(source, "shares", ()):
            raise UserError("batching 'bucket' takes no data weights; use 'pad' or 'pack'")
        batches = BucketedBatches(
            encode=rows.text,
            load=rows.__getitem__,
            processor=processor,
            sizes=sizes_of(source),
            batch_size=batch_size,
            lengths=bucket_lengths(length, buckets),
            images=images,
            window=window or BUCKET_WINDOW * batch_size,
            rows=own,
            seed=seed,
        )
        numbers = grain.MapDataset.range(ENDLESS).map(batches)
        batches = numbers.to_iter_dataset(_reading(threads, 2 * threads))
        return Batches(batches, batching, bad, holds)
    share = slice(jax.process_index(), None, jax.process_count())
    samples = _shuffled(rows, getattr(source, "shares", ()), seed, share)
    dataset = samples.to_iter_dataset(_reading(threads, 4 * batch_size))
    if batching == "pack":
        packed = PackWindow(processor, length, images)
        dataset = dataset.batch(window or PACK_WINDOW, batch_fn=list)
        dataset = grain.experimental.FlatMapIterDataset(dataset, packed)
    count = own.stop - own.start
    batches = dataset.batch(count, drop_remainder=True, batch_fn=_stack)
    return Batches(batches, batching, bad, holds)


def one_pass(
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
    bad = BadSamples(on_bad_sample, len(source))
    rows = Rows(source, processor, length, images, bad, padded=False)
    made = BucketedBatches(
        encode=rows.text,
        load=rows.__getitem__,
        processor=processor,
        sizes=np.full((len(source), 2), min(images, 1)),  # all alike: nothing is sorted by length
        batch_size=batch_size,
        lengths=(row_length or length,),
        images=images,
        window=len(source),
        rows=_own_rows(batch_size),
        seed=seed,
    )
    numbers = grain.MapDataset.range(min(batches or made.per_epoch, made.per_epoch)).map(made)
    return numbers.to_iter_dataset(_reading(threads, 2 * threads))


def _own_rows(batch_size: int) -> slice:
    """Which rows of a batch belong to this process."""
    count, index = jax.process_count(), jax.process_index()
    if batch_size % count:
        raise UserError(f"batch_size {batch_size} does not divide into {count} processes")
    own = batch_size // count
    return slice(index * own, (index + 1) * own)


def _reading(threads: int, buffer: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)


def _shuffled(rows: Rows, shares, seed: int, own: slice) -> grain.MapDataset:
    """This process's part of endless epochs in random order, or of a mixture with weights."""
    whole = grain.MapDataset.source(rows)
    if not shares:
        return whole.shuffle(seed=seed).slice(own).repeat()
    parts = [
        whole.slice(part).shuffle(seed=seed + number).repeat()
        for number, (part, _) in enumerate(shares)
    ]
    return grain.MapDataset.mix(parts, [weight for _, weight in shares]).slice(own)


def _stack(rows: Sequence[Row]) -> Row:
    """Stacked rows. Where no row has an image there are no pixels, and the vision encoder rests.

    Processes must agree on shapes, so with several of them the pixels stay.
    """
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    if jax.process_count() == 1 and "image" in stacked and (stacked["image"] < 0).all():
        stacked.pop("pixels", None)
    return stacked


def to_device_batch(
    stacked: Mapping[str, Any], processor: Processor, sharding=None, holds: Holds = Holds.ANY
):
    """Stacked rows as the objective's input, on the devices of `sharding` (leading axis split)."""
    batch = processor.to_batch(stacked, holds) if "tokens" in stacked else dict(stacked)
    if sharding is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
