"""Packed rows and buckets: what they hold, how they go on, and that the model cannot tell."""

import collections
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.row import Row, stack
from moresjax.data.buckets import bucket_lengths, plan_batches
from moresjax.data.digits import DigitsSource
from moresjax.data.llava import LlavaSource
from moresjax.data.packing import first_fit
from moresjax.data.pipeline import make_iterator, to_device_batch
from moresjax.data.processor import Processor
from moresjax.data.rows import PADDING_SAMPLE
from moresjax.models.vision import VisionEncoder
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import batch_sharding, make_mesh, replicated, shard_params
from moresjax.testing.llava_files import (
    PROCESSOR,
    SIDE,
    VISUAL,
    make_images,
    make_records,
    write_list,
)
from moresjax.testing.models import tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import make_train_step, split_model

COUNT, LENGTH, IMAGES = 60, 96, 4
SMALL = {"num_layers": 1, "unroll": True}
OPTIONS = {"batch_size": 4, "max_seq_len": LENGTH, "images_per_row": IMAGES, "seed": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> LlavaSource:
    folder = tmp_path_factory.mktemp("batching")
    records = make_records(make_images(folder / "images", 10), COUNT)
    return LlavaSource(write_list(folder / "mix.json", records), str(folder / "images"))


@pytest.fixture(scope="module")
def weighted(source, tmp_path_factory) -> LlavaSource:
    """The samples in two files, of which the first has three shares in four."""
    folder = tmp_path_factory.mktemp("weighted")
    records = [source.record(i)[0] for i in range(COUNT)]
    parts = {"first": records[:15], "second": records[15:]}
    files = ";".join(write_list(folder / f"{name}.json", part) for name, part in parts.items())
    return LlavaSource(files, source.image_root, weights="3;1")


@pytest.fixture(scope="module")
def alone(source) -> dict[str, Row]:
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


# ---- First fit.


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(20, 50),
    st.integers(3, 5),
)
def test_first_fit_takes_the_first_row_with_room(samples, length, capacity):
    tokens, images = zip(*samples, strict=True)
    rows = first_fit(tokens, images, length, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(samples)))
    for number, row in enumerate(rows):
        assert row == sorted(row)
        assert sum(tokens[i] for i in row) <= length
        assert sum(images[i] for i in row) <= capacity
        for i in row:  # no earlier row had room when the sample came
            for earlier in rows[:number]:
                before = [j for j in earlier if j < i]
                full = sum(tokens[j] for j in before) + tokens[i] > length
                assert full or sum(images[j] for j in before) + images[i] > capacity


def test_packing_the_llava_mix_wastes_less_than_a_tenth():
    # Lengths as in benchmarks/packing.py: 576 visual tokens and a log-normal text.
    rng = np.random.default_rng(0)
    images = (rng.random(2000) < 0.94).astype(int)
    text = np.where(images, rng.lognormal(5.2, 0.7, 2000), rng.lognormal(7.1, 0.6, 2000))
    tokens = np.minimum(576 * images + text.astype(int) + 45, 2048)
    rows = sum(
        len(first_fit(tokens[i : i + 256].tolist(), images[i : i + 256].tolist(), 4096, 6))
        for i in range(0, 2000, 256)
    )
    assert tokens.sum() / (rows * 4096) >= 0.9


# ---- Packed rows.


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


def test_packed_rows_hold_whole_samples(source, alone):
    batches = take(make_iterator(source, PROCESSOR, batching="pack", **OPTIONS), 12)
    seen = []
    for batch in batches:
        assert batch["tokens"].shape == (4, LENGTH)
        assert batch["pixels"].shape == (4, IMAGES, SIDE, SIDE, 3)
        for name, fields, pixels in documents(batch):
            seen.append(name)
            for key, value in fields.items():
                np.testing.assert_array_equal(value, getattr(alone[name], key), err_msg=key)
            np.testing.assert_array_equal(pixels, pixels_of(alone[name]))
    # Epochs may share a window, but none gets ahead of the other by more than one.
    counts = collections.Counter(seen)
    assert len(counts) == COUNT
    assert max(counts.values()) - min(counts.values()) <= 2
    useful = np.mean([(batch["kind"] != TokenKind.PAD).mean() for batch in batches])
    assert useful >= 0.9


@pytest.mark.parametrize("batching", ["pack", "bucket"])
@pytest.mark.parametrize("before", [0, 1, 9])
def test_a_saved_state_goes_on_exactly(source, batching, before):
    options = OPTIONS | {"batching": batching, "pack_window": 13}
    running = make_iterator(source, PROCESSOR, **options)
    take(running, before)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 8)
    resumed = make_iterator(source, PROCESSOR, **options, num_workers=2)
    take(resumed, 2)  # where it stood does not matter
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected)


# ---- Buckets.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 2)), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_every_sample_is_in_one_batch_of_its_kind(samples, batch_size, window, seed):
    sizes = np.asarray(samples)
    plan = plan_batches(sizes, batch_size, window, np.random.default_rng(seed))
    assert sorted(plan[plan != PADDING_SAMPLE]) == list(range(len(samples)))
    kinds = sizes[:, 1] > 0
    for batch in plan:
        own = batch[batch != PADDING_SAMPLE]
        assert len(own)
        assert len(set(kinds[own].tolist())) == 1
        assert sizes[own, 0].tolist() == sorted(sizes[own, 0], reverse=True)
    fillers = (plan == PADDING_SAMPLE).any(1).sum()
    assert fillers <= len(set(kinds.tolist()))


def test_a_window_of_all_samples_sorts_them_all():
    sizes = np.stack([np.random.default_rng(0).permutation(64), np.ones(64, int)], 1)
    plan = plan_batches(sizes, 8, 64, np.random.default_rng(0))
    assert sorted(sizes[plan, 0].min(1)) == list(range(0, 64, 8))
    assert sizes[plan, 0].min(1).tolist() != sorted(sizes[plan, 0].min(1), reverse=True)


def test_an_epoch_in_buckets_shows_every_sample_once(source, alone):
    batches = take(make_iterator(source, PROCESSOR, batching="bucket", **OPTIONS), 16)
    ids = [str(i) for batch in batches for i in batch["id"] if i]
    assert sorted(ids) == sorted(alone)
    for batch in batches:
        longest = max(len(alone[str(i)]) for i in batch["id"] if i)
        assert batch["tokens"].shape[1] == next(n for n in (24, 48, 72, 96) if n >= longest)
        with_images = [i for i in batch["id"] if i and alone[str(i)].num_images]
        assert ("pixels" in batch) == bool(with_images)
        assert len(with_images) in (0, sum(batch["id"] != ""))
        for number, name in enumerate(batch["id"]):
            count = len(alone[str(name)]) if name else 0
            tokens = alone[str(name)].tokens if name else []
            np.testing.assert_array_equal(batch["tokens"][number, :count], tokens)
            assert (batch["kind"][number, count:] == TokenKind.PAD).all()


@pytest.mark.parametrize("kind", ["images", "text"])
def test_one_kind_alone_can_be_grouped(source, tmp_path, kind):
    chosen = [source.record(i)[0] for i in range(COUNT)]
    chosen = [record for record in chosen if ("image" in record) == (kind == "images")]
    own = LlavaSource(write_list(tmp_path / "kind.json", chosen), source.image_root)
    batches = take(make_iterator(own, PROCESSOR, batching="bucket", **OPTIONS), 8)
    assert all(("pixels" in batch) == (kind == "images") for batch in batches)


def test_lengths_of_buckets():
    assert bucket_lengths(2048, ()) == (512, 1024, 1536, 2048)
    assert bucket_lengths(100, (40, 20)) == (20, 40, 100)
    # A config's buckets stay what they are where rows are made shorter.
    assert bucket_lengths(100, (40, 200)) == (40, 100)
    assert bucket_lengths(100, (100, 200)) == (100,)
    assert bucket_lengths(100, (200,)) == bucket_lengths(100, ()) == (25, 50, 75, 100)
    with pytest.raises(UserError, match=r"buckets \(40, 0\) must be at least 1"):
        bucket_lengths(100, (40, 0))


def test_what_cannot_be_batched_is_refused(source, weighted):
    with pytest.raises(UserError, match="batching 'stack'; choose from: pad, pack, bucket"):
        make_iterator(source, PROCESSOR, batching="stack", **OPTIONS)
    with pytest.raises(
        UserError, match=r"knows its lengths \(llava, arrayrecord\), not DigitsSource"
    ):
        make_iterator(DigitsSource("instruct"), PROCESSOR, batching="bucket", **OPTIONS)
    with pytest.raises(UserError, match="'bucket' takes no data weights"):
        make_iterator(weighted, PROCESSOR, batching="bucket", **OPTIONS)
    patches = DigitsSource("patches")
    with pytest.raises(
        UserError, match=r"ready-made rows \(digits-patches-.*\) need batching 'pad'"
    ):
        next(make_iterator(patches, PROCESSOR, batching="pack", **OPTIONS))


# ---- Processes.


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


# ---- The model.


@pytest.fixture(scope="module")
def model():
    return tiny_model("mores:rank=1,positions=image:f2+l3", vocab_size=37, num_layers=2)


def forward(model, stacked):
    batch = to_device_batch({k: v for k, v in stacked.items() if k != "id"}, PROCESSOR)
    return np.asarray(_logits(model, batch))


@nnx.jit
def _logits(model, batch):
    return model.llm.logits(model(batch).hidden)


def padded(rows, length=LENGTH):
    rows = [PROCESSOR.pad(row, length, IMAGES) for row in rows]
    return stack([row.to_dict() for row in rows])


def test_packed_documents_have_the_logits_they_have_alone(source, alone, model):
    packed = next(make_iterator(source, PROCESSOR, batching="pack", **OPTIONS))
    together = forward(model, packed)
    members = [str(ids).split(";") for ids in packed["id"]]
    assert max(map(len, members)) >= 3
    names = [name for row in members for name in row]
    apart = []
    for start in range(0, len(names), 4):
        own = [alone[name] for name in (names[start : start + 4] + names[:4])[:4]]
        apart += list(forward(model, padded(own)))
    for number, row in enumerate(members):
        for document, name in enumerate(row):
            own = (packed["document"][number] == document) & (packed["kind"][number] > 0)
            count = len(alone[name])
            expected = apart[names.index(name)][:count]
            assert np.abs(together[number][own] - expected).max() <= 1e-4


@pytest.fixture(scope="module")
def small():
    """Definition, trained connector and frozen rest of a model that compiles quickly."""
    graphdef, *states = split_model(tiny_model(vocab_size=37, **SMALL), ("connector",))
    return graphdef, *jax.tree.map(np.asarray, states)


def test_the_loss_is_the_mean_over_labels_however_rows_are_packed_cut_and_split(
    source, alone, small
):
    options = OPTIONS | {"batch_size": 8}
    packed = next(make_iterator(source, PROCESSOR, batching="pack", **options))
    names = [name for ids in packed.pop("id") for name in str(ids).split(";")]
    unpacked = to_device_batch(padded([alone[name] for name in names]), PROCESSOR)
    optimizer = optax.sgd(0.1)
    graphdef, *start = small

    def run(batch, mesh, microbatches):
        trainable, frozen = (shard_params(part, mesh) for part in start)
        zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
        state = TrainState(zero, trainable, optimizer.init(trainable))
        step = make_train_step(
            graphdef, next_token, optimizer, lambda _: 0.1, microbatches=microbatches
        )
        return jax.jit(step)(state, frozen, batch)

    one = make_mesh(devices=jax.devices()[:1])
    wanted_state, wanted = run(unpacked, one, 1)
    assert float(wanted["labels"]) > 40
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), wanted_state.trainable, start[0])
    assert max(jax.tree.leaves(moved)) > 1e-3
    eight = make_mesh(data=4, fsdp=2)
    four = make_mesh(data=4, devices=jax.devices()[:4])
    for mesh, microbatches in ((eight, 1), (four, 2)):
        batch = to_device_batch(packed, PROCESSOR, batch_sharding(mesh))
        state, measured = run(batch, mesh, microbatches)
        for name in ("loss", "accuracy", "labels", "grad_norm"):
            assert float(measured[name]) == pytest.approx(float(wanted[name]), rel=1e-4), name
        for a, b in zip(
            jax.tree.leaves(state.trainable), jax.tree.leaves(wanted_state.trainable), strict=True
        ):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


def test_a_step_is_compiled_once_per_bucket_and_text_runs_no_vision(source, small, monkeypatch):
    traces = collections.Counter()
    graphdef, trainable, frozen = small
    original = VisionEncoder.__call__

    def counted(self, *args, **kwargs):
        traces["vision"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VisionEncoder, "__call__", counted)

    def objective(model, batch, key=None):
        visions = traces["vision"]
        loss = next_token(model, batch, key)
        images = batch.pixels is not None
        assert traces["vision"] - visions == int(images)
        traces[batch.tokens.shape[1], images] += 1
        return loss

    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(graphdef, objective, optimizer, lambda _: 0.0))
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    options, shapes = OPTIONS | {"buckets": (40,)}, set()
    for stacked in take(make_iterator(source, PROCESSOR, batching="bucket", **options), 32):
        stacked.pop("id")
        shapes.add((stacked["tokens"].shape[1], "pixels" in stacked))
        state, _ = step(state, frozen, to_device_batch(stacked, PROCESSOR))
    assert {images for _, images in shapes} == {True, False}
    del traces["vision"]
    assert traces == dict.fromkeys(shapes, 1)


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
