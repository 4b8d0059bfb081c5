"""Conversations and their images in sharded ArrayRecord files, for random access over a network.

A record is one line of JSON (LLaVA's, with the sizes of its images in bytes as `image_bytes`), then
the image files one after the other, unchanged.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from moresjax.core.errors import UserError
from moresjax.core.json_files import write_json
from moresjax.core.reading import IMAGE, Count, check_file, read_bytes, read_json
from moresjax.data.llava import (
    LlavaSource,
    image_names,
    independent_turns,
    is_independent,
    to_sample,
)
from moresjax.data.samples import Sample

INDEX = "index.json"  # written last: a folder without it is not complete
SIZES = "sizes.npy"


def convert_llava(
    source: LlavaSource, out: str | Path, *, shards: int = 16, progress: bool = True
) -> dict:
    """Writes LLaVA files and their images as ArrayRecord shards.

    Args:
      source: The samples to write, in their order.
      out: A folder that is new or empty.
      shards: The number of files; no more than there are samples.
      progress: Whether to show a progress bar.

    Returns:
      The content of the index: the number of records, and every shard with its number of records.

    Raises:
      UserError: A sample is bad, an image cannot be read, the folder has files, there are no
        samples, or the number of shards is below 1.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty")
    if shards < 1 or not len(source):
        raise UserError(f"{len(source)} samples cannot be written in {shards} shards")
    shards = min(shards, len(source))
    out.mkdir(parents=True, exist_ok=True)
    borders = np.linspace(0, len(source), shards + 1).round().astype(int)
    files = {}
    with tqdm(total=len(source), unit="sample", disable=not progress) as bar:
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            name = f"data-{number:05d}-of-{shards:05d}.arrayrecord"
            # Groups of one record: shuffled reading never decompresses a neighbour.
            writer = ArrayRecordWriter(str(out / name), "group_size:1")
            for index in range(start, stop):
                writer.write(_pack(source, index))
                bar.update()
            writer.close()
            files[name] = int(stop - start)
    np.save(out / SIZES, np.concatenate([source.sizes, source.turn_counts], axis=1))
    index = {"records": len(source), "shards": files}
    write_json(out / INDEX, index)
    return index


def _pack(source: LlavaSource, index: int) -> bytes:
    record, name = source.record(index)
    found = source.named_images(image_names(record, name), name)
    to_sample(record, name, found)  # a bad sample stops the conversion
    images = []
    for path in found:
        what = f"sample {name}: image"
        images.append(path if isinstance(path, bytes) else read_bytes(path, what=what, most=IMAGE))
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
