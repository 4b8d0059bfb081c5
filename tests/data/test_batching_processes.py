"""Batches of several processes, and batches with bad samples: nothing else moves."""

import itertools
import json

import jax
import numpy as np
import pytest
from batching import (
    COUNT,
    IMAGES,
    LENGTH,
    OPTIONS,
    assert_same,
    documents,
    in_two_files,
    mix,
    pixels_of,
    rows_alone,
    take,
)

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.llava import LlavaSource
from moresjax.data.pipeline import make_iterator
from moresjax.data.processor import Processor
from moresjax.testing.llava_files import (
    PROCESSOR,
    write_list,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> LlavaSource:
    return mix(tmp_path_factory.mktemp("batching"))


@pytest.fixture(scope="module")
def weighted(source, tmp_path_factory) -> LlavaSource:
    return in_two_files(source, tmp_path_factory.mktemp("weighted"))


@pytest.fixture(scope="module")
def alone(source) -> dict[str, Row]:
    return rows_alone(source)


def as_process(monkeypatch, index: int, count: int):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


class Counted:
    """A source that notes what is read, and which images are opened."""

    def __init__(self, source):
        self.source, self.read = source, set()
        self.sizes = source.sizes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.add(int(index))
        return self.source[index]


def in_processes(monkeypatch, count: int, source, batches: int, **options):
    """The first batches of every process, and its states after each of them."""
    found, states = [], []
    for index in range(count):
        as_process(monkeypatch, index, count)
        iterator = make_iterator(source, PROCESSOR, **options)
        pairs = [(next(iterator), json.dumps(iterator.get_state())) for _ in range(batches)]
        found.append([batch for batch, _ in pairs])
        states.append([json.loads(state) for _, state in pairs])
    monkeypatch.undo()
    return found, states


def test_a_process_reads_only_its_rows_of_padded_batches(source, monkeypatch):
    shares = []
    for index in range(3):
        as_process(monkeypatch, index, 3)
        counted = Counted(source)
        options = OPTIONS | {"batch_size": 3}
        batch = next(make_iterator(counted, PROCESSOR, **options))
        assert batch["tokens"].shape == (1, LENGTH)
        shares.append(counted.read)
        assert 0 < len(counted.read) <= COUNT // 3
    assert sum(map(len, shares)) == len(set.union(*shares))


def test_a_process_opens_only_the_images_of_its_packed_rows(source, monkeypatch):
    opened, original = [], Processor.pixels

    def noted(self, sample):
        opened[-1].add(sample.id)
        return original(self, sample)

    monkeypatch.setattr(Processor, "pixels", noted)
    for index in range(3):
        as_process(monkeypatch, index, 3)
        opened.append(set())
        options = OPTIONS | {"batch_size": 3, "batching": "pack"}
        batch = next(make_iterator(source, PROCESSOR, **options))
        names = str(batch["id"][0]).split(";")
        assert {name for name, _, pixels in documents(batch) if len(pixels)} <= opened[-1]
        assert len(names) > 1
    # What was read ahead is of the first epoch as well.
    assert sum(map(len, opened)) == len(set.union(*opened))


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket", "weighted"])
def test_processes_make_the_batches_of_one_and_go_on_in_another_number(
    source, weighted, monkeypatch, batching
):
    chosen, batching = (weighted, "pack") if batching == "weighted" else (source, batching)
    options = OPTIONS | {"batching": batching, "pack_window": 13}
    running = make_iterator(chosen, PROCESSOR, **options)
    whole = take(running, 6)
    halves, states = in_processes(monkeypatch, 2, chosen, 6, **options)
    for number, batch in enumerate(whole):
        parts = [half[number] for half in halves]
        assert {part["tokens"].shape for part in parts} == {(2, batch["tokens"].shape[1])}
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same([joined], [batch])
    assert states[0] == states[1]
    assert states[0][-1] == running.get_state()
    whole += take(running, 2)
    resumed = make_iterator(chosen, PROCESSOR, **options)
    for done, state in enumerate(states[0], 1):
        resumed.set_state(state)
        assert_same(take(resumed, 2), whole[done : done + 2])


def test_weights_are_the_shares_of_packed_documents(weighted):
    batches = take(
        make_iterator(weighted, PROCESSOR, batching="pack", pack_window=13, **OPTIONS), 30
    )
    names = [name for batch in batches for ids in batch["id"] for name in str(ids).split(";")]
    assert len(names) > 300
    share = sum(name.startswith("first") for name in names) / len(names)
    assert share == pytest.approx(0.75, abs=0.01)


def test_the_position_of_an_older_version_is_refused(source):
    packed = make_iterator(source, PROCESSOR, batching="pack", **OPTIONS)
    with pytest.raises(UserError, match=r"saved by an older version of moresjax, .* cannot go on"):
        packed.set_state({"processes": [{"next_index": 8}]})


# ---- Bad images.


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_image_leaves_padding_and_moves_no_other_document(
    source, alone, tmp_path, monkeypatch, processes
):
    records = [source.record(i)[0] for i in range(COUNT)]
    spoilt = {i for i, record in enumerate(records) if "image" in record and i % 3 != 1}
    changed = [
        record | {"image": ["none.png"] * (2 if isinstance(record["image"], list) else 1)}
        if i in spoilt
        else record
        for i, record in enumerate(records)
    ]
    # The same name, so that the ids are the same.
    bad = LlavaSource(write_list(tmp_path / "mix.json", changed), source.image_root)
    names = {bad[i].id for i in spoilt}
    options = OPTIONS | {"batching": "pack", "pack_window": 13, "on_bad_sample": "skip"}
    wanted, _ = in_processes(monkeypatch, processes, source, 8, **options)
    found, states = in_processes(monkeypatch, processes, bad, 8, **options)
    assert states == [states[0]] * processes
    empty = 0
    batches = zip(*map(itertools.chain.from_iterable, (found, wanted)), strict=True)
    for batch, whole in batches:
        left = [[n for n in str(ids).split(";") if n not in names] for ids in whole["id"]]
        assert batch["id"].tolist() == [";".join(row) for row in left]
        empty += left.count([])
        kept = [found for found in documents(batch) if found[0]]
        assert [name for name, *_ in kept] == [name for row in left for name in row]
        for name, fields, pixels in kept:
            for key, value in fields.items():
                np.testing.assert_array_equal(value, getattr(alone[name], key), err_msg=key)
            np.testing.assert_array_equal(pixels, pixels_of(alone[name]))
        useful = (batch["kind"] != TokenKind.PAD).sum(1)
        counts = [sum(len(alone[name]) for name in row) for row in left]
        assert useful.tolist() == counts
    assert empty > 0


def test_a_bad_sample_is_a_row_of_padding_beside_the_same_neighbours(source, tmp_path):
    records = [source.record(i)[0] for i in range(COUNT)]
    records[5] = records[5] | {"conversations": []}
    bad = LlavaSource(write_list(tmp_path / "mix.json", records), source.image_root)
    names = {source[5].id}
    options = OPTIONS | {"on_bad_sample": "skip"}
    wanted = take(make_iterator(source, PROCESSOR, **OPTIONS), 15)
    found = take(make_iterator(bad, PROCESSOR, **options), 15)
    for batch, whole in zip(found, wanted, strict=True):
        ids = whole["id"].tolist()
        assert batch["id"].tolist() == ["" if name in names else name for name in ids]
        padding = (batch["kind"] == TokenKind.PAD).all(1)
        assert padding.tolist() == [name in names for name in ids]


def test_batches_of_text_have_no_pixels(source, tmp_path, monkeypatch):
    chosen = [source.record(i)[0] for i in range(COUNT)]
    texts = [record for record in chosen if "image" not in record]
    own = LlavaSource(write_list(tmp_path / "text.json", texts), source.image_root)
    for batching in ("pad", "pack"):
        options = OPTIONS | {"batching": batching}
        assert "pixels" not in next(make_iterator(own, PROCESSOR, **options))
        as_process(monkeypatch, 0, 2)
        batch = next(make_iterator(own, PROCESSOR, **options))
        if batching == "pad":  # processes must agree, and none knows the rows of the others
            assert batch.pop("pixels").shape[:2] == (2, IMAGES)
        assert "pixels" not in batch
        monkeypatch.undo()
