"""Samples of a LLaVA file as batches: what tests of batching share."""

import itertools
from pathlib import Path

import numpy as np

from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.llava import LlavaSource
from moresjax.testing.llava_files import (
    PROCESSOR,
    SIDE,
    VISUAL,
    make_images,
    make_records,
    write_list,
)

COUNT, LENGTH, IMAGES = 60, 96, 4
OPTIONS = {"batch_size": 4, "max_seq_len": LENGTH, "images_per_row": IMAGES, "seed": 5}


def mix(folder: Path) -> LlavaSource:
    """Sixty conversations, with and without images."""
    records = make_records(make_images(folder / "images", 10), COUNT)
    return LlavaSource(write_list(folder / "mix.json", records), str(folder / "images"))


def in_two_files(source: LlavaSource, folder: Path) -> LlavaSource:
    """The samples in two files, of which the first has three shares in four."""
    records = [source.record(i)[0] for i in range(COUNT)]
    parts = {"first": records[:15], "second": records[15:]}
    files = ";".join(write_list(folder / f"{name}.json", part) for name, part in parts.items())
    return LlavaSource(files, source.image_root, weights="3;1")


def rows_alone(source: LlavaSource) -> dict[str, Row]:
    """The row of every sample, by id."""
    return {(sample := source[i]).id: PROCESSOR.row(sample) for i in range(COUNT)}


def pixels_of(row: Row) -> np.ndarray:
    return (
        np.zeros((0, SIDE, SIDE, 3), np.float32) if row.pixels is None else np.asarray(row.pixels)
    )


def take(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def assert_same(a: list[dict], b: list[dict]):
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def documents(batch: dict):
    """(id, fields of the document, its pixels) of every document of a packed batch."""
    for number, ids in enumerate(batch["id"]):
        row = {name: batch[name][number] for name in batch if name != "id"}
        before = 0
        for document, name in enumerate(str(ids).split(";")):
            own = (row["document"] == document) & (row["kind"] != TokenKind.PAD)
            fields = {key: x[own] for key, x in row.items() if key not in ("pixels", "document")}
            count = (fields["image"] >= 0).sum() // VISUAL
            visual = fields["image"] >= 0
            fields["image"] = fields["image"] - np.where(visual, before * VISUAL, 0)
            yield name, fields, row["pixels"][before : before + count]
            before += count
        assert not row["pixels"][before:].any()
