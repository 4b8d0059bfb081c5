"""The Grain pipeline: static shapes, shuffling by seed, exact continuation from a saved state."""

import itertools
import json

import jax
import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind
from moresjax.core.row import FIELDS
from moresjax.data.digits import DigitsSource, build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.pipeline import make_iterator, to_device_batch
from moresjax.data.processor import Processor
from moresjax.data.rows import RowReader
from moresjax.data.skipping import SkipPolicy
from moresjax.data.sources import make_source
from moresjax.data.templates import get_template

PROCESSOR = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(32), 16)
LENGTH = 84


def iterator(task="instruct", **options):
    source = options.pop("source", None) or DigitsSource(task, size=40)
    images = 0 if task == "text" else 1
    options = {"batch_size": 4, "max_seq_len": LENGTH, "images_per_row": images} | options
    return make_iterator(source, PROCESSOR, **options)


def take(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def assert_same(a: list[dict], b: list[dict]):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def shown(batches) -> list[bytes]:
    """The row of every sample, as a value to compare."""
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_batches_have_one_shape():
    for batch in take(iterator(), 12):
        assert batch["pixels"].shape == (4, 1, 32, 32, 3)
        assert batch["pixels"].dtype == np.float32
        for name in FIELDS:
            assert batch[name].shape == (4, LENGTH)
            assert batch[name].dtype == np.int32


def test_text_batches_have_no_pixels():
    batch = take(iterator("text"), 1)[0]
    assert "pixels" not in batch
    assert PROCESSOR.to_batch(batch).pixels is None


def test_rows_are_those_of_the_processor():
    source = DigitsSource("instruct", size=40)
    rows = {
        PROCESSOR.pad(PROCESSOR.row(source[i]), LENGTH, 1).tokens.tobytes(): i for i in range(40)
    }
    found = [rows[row] for row in shown(take(iterator(), 20))]
    # Two epochs, each of which shows every sample once, in another order.
    assert sorted(found[:40]) == sorted(found[40:]) == list(range(40))
    assert found[:40] != list(range(40))
    assert found[:40] != found[40:]


def test_the_seed_decides_the_order():
    assert_same(take(iterator(seed=3), 5), take(iterator(seed=3), 5))
    one, other = shown(take(iterator(seed=3), 10)), shown(take(iterator(seed=4), 10))
    assert one != other
    assert sorted(one) == sorted(other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("before", [0, 3, 11])
def test_a_saved_state_goes_on_exactly(before, threads):
    running = iterator(num_workers=threads)
    take(running, before)
    state = running.get_state()
    expected = take(running, 6)
    resumed = iterator(num_workers=threads)
    take(resumed, 2)  # where it stood does not matter
    resumed.set_state(json.loads(json.dumps(state)))
    assert_same(take(resumed, 6), expected)


def test_threads_do_not_change_the_order():
    assert_same(take(iterator(num_workers=1), 6), take(iterator(num_workers=3), 6))


def test_patches_are_passed_on():
    batch = take(iterator("patches"), 1)[0]
    assert batch["pixels"].shape == (4, 32, 32, 3)
    assert batch["classes"].shape == (4, 16, 2)
    assert batch["pixels"].min() >= -1
    assert batch["pixels"].max() <= 1
    source = DigitsSource("patches", "test")
    (row,) = RowReader(source, PROCESSOR, LENGTH, 1, SkipPolicy("raise", 1)).padded([0])
    np.testing.assert_array_equal(row["pixels"], PROCESSOR.image(source[0]["pixels"]))
    np.testing.assert_array_equal(row["classes"], source[0]["classes"])


def test_a_bad_sample_is_named():
    source = DigitsSource("instruct")
    with pytest.raises(UserError, match=rf"sample {source[5].id}: \d+ tokens do not fit into 20"):
        RowReader(source, PROCESSOR, 20, 1, SkipPolicy("raise", 1)).padded([5])
    with pytest.raises(UserError, match=r"sample digits-instruct-0-\d+: \d+ tokens do not fit"):
        next(iterator(max_seq_len=20))


def test_a_batch_on_the_devices():
    stacked = take(iterator(), 1)[0]
    batch = to_device_batch(stacked, PROCESSOR)
    assert isinstance(batch, Batch)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch))
    np.testing.assert_array_equal(batch.tokens, stacked["tokens"])
    assert ((batch.layout.kind == TokenKind.IMAGE).sum(1) == 16).all()
    assert batch.layout.visual_tokens == 16


def test_a_batch_split_over_devices():
    mesh = jax.make_mesh((4,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    stacked = take(iterator(), 1)[0]
    batch = to_device_batch(stacked, PROCESSOR, sharding)
    assert batch.tokens.sharding == sharding
    assert batch.pixels.addressable_shards[0].data.shape == (1, 1, 32, 32, 3)
    np.testing.assert_array_equal(batch.pixels, stacked["pixels"])


def test_named_sources():
    source = make_source("digits", task="caption", seed=4)
    assert source == DigitsSource("caption", seed=4)
    assert len(make_source("digits", task="text", size=7)) == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coco", {"task": "text"}, "unknown data source 'coco'; choose from: .*digits"),
        ("digits", {"task": "text", "colour": 1}, "option of data source 'digits' 'colour'.*task"),
        ("digits", {"task": "sing"}, "digits task 'sing'; choose from: text, patches"),
        ("digits", {"task": "text", "split": "dev"}, "split 'dev'; choose from: train, val, test"),
    ],
)
def test_unknown_sources_and_options(name, options, message):
    with pytest.raises(UserError, match=message):
        make_source(name, **options)
