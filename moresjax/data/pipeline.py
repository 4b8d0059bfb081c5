"""From a source to an iterator of batches, with Grain.

Every process reads its own share of the source; the iterator's state is a small JSON value that
goes into the checkpoint, so a resumed run sees exactly the batches that an uninterrupted one would.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import jax

from moresjax.data.digits import DigitsSource
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample
from moresjax.errors import choice_error


@runtime_checkable
class Source(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Mapping[str, Any]: ...


SOURCES: dict[str, Callable[..., Source]] = {"digits": DigitsSource}


def make_source(name: str, **options) -> Source:
    """The named source.

    Raises:
      UserError: for an unknown name or option.
    """
    if name not in SOURCES:
        raise choice_error("data source", name, SOURCES)
    fields = [field.name for field in dataclasses.fields(SOURCES[name])]
    for option in options:
        if option not in fields:
            raise choice_error(f"option of data source {name!r}", option, fields)
    return SOURCES[name](**options)


@dataclasses.dataclass(frozen=True)
class EncodeSample(grain.transforms.Map):
    """Samples to padded rows; ready-made rows only have their images normalised."""

    processor: Processor
    length: int
    images: int

    def map(self, element):
        if isinstance(element, Sample):
            row = self.processor.row(element)
            return self.processor.pad(row, self.length, self.images, element.id) | {
                "id": element.id
            }
        return dict(element) | {"pixels": self.processor.image(element["pixels"])}


def make_iterator(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    length: int,
    images: int = 0,
    seed: int = 0,
    threads: int = 1,
) -> "grain.DatasetIterator":
    """An endless, shuffled iterator over stacked rows of this process's share.

    Args:
      source: the samples.
      processor: how they become rows.
      batch_size: global batch size; each process gets its share of it.
      length: S, tokens per row.
      images: N, images per row; 0 for text.
      seed: of the shuffling.
      threads: reading threads.
    """
    count, index = jax.process_count(), jax.process_index()
    dataset = (
        grain.MapDataset.source(source)
        .shuffle(seed=seed)[index::count]
        .repeat()
        .map(EncodeSample(processor, length, images))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * batch_size)
        )
        .batch(batch_size // count, drop_remainder=True)
    )
    return iter(dataset)


def to_device_batch(stacked: Mapping[str, Any], processor: Processor, sharding=None):
    """Stacked rows as the objective's input, on the devices of `sharding` (leading axis split)."""
    batch = processor.to_batch(stacked) if "tokens" in stacked else dict(stacked)
    if sharding is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
