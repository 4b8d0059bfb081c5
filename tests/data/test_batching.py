"""Packed rows and buckets: what they hold, how they go on, and that the model cannot tell."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from moresjax.data.rows import PADDING_SAMPLE
from moresjax.models.vision import VisionEncoder
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import batch_sharding, make_mesh, replicated, shard_params
from moresjax.testing.llava_files import (
    PROCESSOR,
    SIDE,
    write_list,
)
from moresjax.testing.models import tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import make_train_step, split_model

SMALL = {"num_layers": 1, "unroll": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> LlavaSource:
    return mix(tmp_path_factory.mktemp("batching"))


@pytest.fixture(scope="module")
def weighted(source, tmp_path_factory) -> LlavaSource:
    return in_two_files(source, tmp_path_factory.mktemp("weighted"))


@pytest.fixture(scope="module")
def alone(source) -> dict[str, Row]:
    return rows_alone(source)


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
