"""Conversations and their images in sharded ArrayRecord files, for random access over a network.

A record is one line of JSON (LLaVA's, with the sizes of its images in bytes as `image_bytes`), then
the image files one after the other, unchanged.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from moresjax.core.errors import UserError
from moresjax.core.folders import disk_reason, explain_disk, new_folder
from moresjax.core.json_files import write_json
from moresjax.core.reading import IMAGE, Count, check_file, read_bytes, read_json
from moresjax.data.images import open_image
from moresjax.data.llava import (
    LlavaSource,
    image_names,
    independent_turns,
    is_independent,
    to_sample,
)
from moresjax.data.samples import Sample
from moresjax.data.skipping import SkipPolicy

INDEX = "index.json"
SIZES = "sizes.npy"
SKIPPED = "skipped_samples.json"
TOLD = 20  # skipped samples that the log names; the file has all
AHEAD = 2  # samples for each thread that are read before they are written


def convert_llava(
    source: LlavaSource,
    out: str | Path,
    *,
    shards: int = 16,
    decode: bool = True,
    on_bad_sample: str = "skip",
    num_workers: int = 0,
    progress: bool = True,
) -> dict:
    """Writes LLaVA files and their images as ArrayRecord shards.

    The folder is complete or not there. Where samples were skipped, its `skipped_samples.json`
    counts and lists them.

    Args:
      source: The samples to write, in their order.
      out: A folder that is new or empty.
      shards: The number of files; no more than there are samples.
      decode: Whether images are decoded, which takes most of the time; else they are only copied.
      on_bad_sample: `skip` leaves out a sample that cannot be used, `raise` ends with its error.
      num_workers: The number of threads that read; 0: one per core.
      progress: Whether to show a progress bar.

    Returns:
      The content of the index: the number of records, every shard with its number of records, and
      the number of samples that were skipped.

    Raises:
      UserError: Every sample is bad, or one where `on_bad_sample` is `raise`; a data file has
        changed since it was indexed; the folder has files or cannot be written; the number of
        shards is below 1.
    """
    if shards < 1 or not len(source):
        raise UserError(f"{len(source)} samples cannot be written in {shards} shards")
    if num_workers < 0:
        raise UserError(f"num_workers must be at least 0, got {num_workers}")
    policy = SkipPolicy(on_bad_sample, len(source), told=TOLD)
    borders = np.linspace(0, len(source), min(shards, len(source)) + 1).round().astype(int)
    records = _good_records(source, policy, decode, num_workers or os.cpu_count() or 1, progress)
    with new_folder(out, "conversion") as folder, contextlib.closing(records):
        kept = []
        for _, part in itertools.groupby(records, lambda x: borders.searchsorted(x[0], "right")):
            kept.append(_write_shard(folder / str(len(kept)), part, out))
        files = {}
        for number, indices in enumerate(kept):
            name = f"data-{number:05d}-of-{len(kept):05d}.arrayrecord"
            (folder / str(number)).rename(folder / name)
            files[name] = len(indices)
        written = np.concatenate(kept)
        with explain_disk(out), open(folder / SIZES, "wb") as file:
            np.save(file, np.concatenate([source.sizes, source.turn_counts], axis=1)[written])
        policy.save(folder / SKIPPED)
        index = {"records": len(written), "shards": files, "skipped": len(policy.skipped)}
        write_json(folder / INDEX, index)
    return index


def _good_records(
    source: LlavaSource, policy: SkipPolicy, decode: bool, num_workers: int, progress: bool
) -> Generator[tuple[int, bytes], None, None]:
    """Number and content of every record that is not skipped; threads read ahead."""
    bar = tqdm(total=len(source), unit="sample", disable=not progress)
    with ThreadPoolExecutor(num_workers, "reading") as pool, bar:
        numbers = iter(range(len(source)))
        first = itertools.islice(numbers, AHEAD * num_workers)
        coming = collections.deque(pool.submit(_pack, source, n, decode) for n in first)
        for index in range(len(source)):
            packed = policy.attempt(index, coming.popleft().result)
            coming.extend(
                pool.submit(_pack, source, n, decode) for n in itertools.islice(numbers, 1)
            )
            bar.update()
            if packed is not None:
                yield index, packed


def _write_shard(path: Path, records: Iterable[tuple[int, bytes]], out: str | Path) -> list[int]:
    """Writes a file of records, and returns their numbers.

    Raises:
      UserError: The file cannot be written; names `out`, in which it was to be.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # Groups of one record: shuffled reading never decompresses a neighbour.
    writer, written = ArrayRecordWriter(str(path), "group_size:1"), []
    try:
        for index, record in records:
            if not writer.ok():
                break
            writer.write(record)
            written.append(index)
    finally:
        reason = "" if writer.ok() else "the shard is not complete"
        try:
            writer.close()
        except RuntimeError as error:  # the only kind that the library raises
            reason = disk_reason(error) or str(error)
        if reason:
            raise UserError(f"{out} cannot be written: {reason}")
    return written


def _pack(source: LlavaSource, index: int, decode: bool) -> bytes:
    record, name = source.record(index)
    found = source.named_images(image_names(record, name), name)
    to_sample(record, name, found)  # which a bad sample cannot be made to
    images = []
    for path in found:
        what, called = f"sample {name}: image", "" if isinstance(path, bytes) else f" {path}"
        images.append(path if isinstance(path, bytes) else read_bytes(path, what=what, most=IMAGE))
        if decode:
            open_image(images[-1], what + called)
    line = json.dumps(record | {"name": name, "image_bytes": [len(image) for image in images]})
    return b"\n".join([line.encode(), b"".join(images)])


class _Index(TypedDict):
    records: Count
    shards: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class ArrayRecordSource:
    """Samples of a folder written by `convert_llava`.

    Attributes:
      folder: The folder with the shards and their index.
      turns: `dialogue`, or `independent`: each question of a conversation by itself on the shared
        images.
    """

    folder: str
    turns: str = "dialogue"
    branches: ClassVar[bool] = False  # of a source of dialogues

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", is_independent(self.turns))
        _ = self._reader

    @functools.cached_property
    def _reader(self) -> Any:  # the library declares no `__len__`
        from grain.sources import ArrayRecordDataSource

        root = Path(self.folder)
        if not (root / INDEX).is_file():
            raise UserError(f"{root} has no {INDEX}: it is not a (complete) converted data set")
        shards = read_json(root / INDEX, _Index)["shards"]
        for name in shards:
            if len(name) > 99 or Path(name).name != name or not (root / name).is_file():
                raise UserError(f"{root} lacks the shard {name}")
        try:
            reader: Any = ArrayRecordDataSource([str(root / name) for name in shards])
        except Exception as error:  # the library raises kinds of its own
            raise UserError(f"the shards of {root} cannot be read: {error}") from None
        if len(reader) != sum(shards.values()):
            raise UserError(f"{root}: the shards have {len(reader)} records, not as {INDEX} says")
        return reader

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """The words and images of every sample."""
        return self._numbers[:, :2]

    @property
    def turn_counts(self) -> Int[np.ndarray, "n k"]:
        """As those of `LlavaSource`; version 0.2 did not note them, then k is 0."""
        return self._numbers[:, 2:]

    @functools.cached_property
    def _numbers(self) -> Int[np.ndarray, "n k"]:
        file = check_file(Path(self.folder) / SIZES)
        try:
            numbers = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        if numbers.ndim != 2 or numbers.shape[0] != len(self) or numbers.dtype.kind not in "iu":
            raise UserError(f"{file} does not hold the sizes of {len(self)} samples")
        return numbers

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Sample:
        try:
            line, _, rest = self._reader[index].partition(b"\n")
            record = json.loads(line)
            name, borders = record["name"], np.cumsum([0, *record["image_bytes"]])
        except Exception as error:  # a damaged shard: the library raises kinds of its own
            raise UserError(f"record {index} of {self.folder} is damaged: {error}") from None
        images = [rest[a:b] for a, b in itertools.pairwise(borders)]
        sample = to_sample(record, name, images)
        return independent_turns(sample) if self.branches else sample
