"""Checkpoints: what is saved comes back, and damage is noticed and passed over."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.runs.checkpoint import Checkpoints, named
from moresjax.runs.state import TrainState
from moresjax.testing.models import tiny_model
from moresjax.training.step import split_model


def make_state(step: int, seed: int = 0) -> TrainState:
    """A connector with Adam's moments, every number random."""
    trainable = split_model(tiny_model(), ("connector",))[1]
    rng = np.random.default_rng((seed, step))

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        return jnp.full_like(x, step)

    state = TrainState(jnp.asarray(step, jnp.int32), trainable, optax.adam(1e-3).init(trainable))
    return jax.tree.map(fill, state)


def save(directory: Path, *steps: int, seed: int = 0) -> None:
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(make_state(step, seed), {"next_index": 10 * step})
    checkpoints.close()


def restore(directory: Path):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore(make_state(0))
    finally:
        checkpoints.close()


def assert_restored(directory: Path, step: int, seed: int = 0) -> None:
    state, data = restore(directory)
    wanted = make_state(step, seed)
    assert data == {"next_index": 10 * step}
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def array_file(directory: Path, step: int, item: str) -> Path:
    """The largest file of an item: the one with the arrays."""
    files = [path for path in (directory / str(step) / item).rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 4 :: 7] = bytes(b ^ 0x55 for b in data[len(data) // 4 :: 7])
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "flipped": flip, "removed": Path.unlink}


def test_everything_comes_back(tmp_path):
    save(tmp_path, 4)
    assert_restored(tmp_path, 4)


def test_parameters_come_back_by_name(tmp_path):
    save(tmp_path, 2, 4)
    checkpoints = Checkpoints(tmp_path)
    step, arrays = checkpoints.restore_parameters()
    checkpoints.close()
    wanted = named(make_state(4).trainable)
    assert step == 4
    assert set(arrays) == set(wanted)
    assert "connector.layers.0.kernel" in arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name])


def test_a_sharded_state_comes_back_sharded(tmp_path):
    save(tmp_path, 3)
    like = make_state(0)
    mesh = jax.make_mesh((8,), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    spread = {
        n: jax.device_put(x, rows) for n, x in named(like.trainable).items() if not x.size % 8
    }
    assert spread
    flat = [
        (path, variable.replace(spread.get(".".join(map(str, path)), variable.get_value())))
        for path, variable in nnx.to_flat_state(like.trainable)
    ]
    like = TrainState(like.step, nnx.from_flat_state(flat), like.opt_state)
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore(like)
    checkpoints.close()
    wanted = named(make_state(3).trainable)
    for name, array in named(state.trainable).items():
        np.testing.assert_array_equal(array, wanted[name])
        if name in spread:
            assert array.sharding.is_equivalent_to(rows, array.ndim)


def test_the_last_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [3, 4]
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]


def test_an_empty_directory(tmp_path):
    assert restore(tmp_path) is None
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore_parameters()
    checkpoints.close()


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog, damage, item):
    save(tmp_path, 2, 4)
    DAMAGES[damage](array_file(tmp_path, 4, item))
    with caplog.at_level(logging.WARNING, "moresjax.runs.checkpoint"):
        assert_restored(tmp_path, 2)
    assert "checkpoint 4 is damaged" in caplog.text


def test_damaged_metadata_is_passed_over(tmp_path, caplog):
    save(tmp_path, 2, 4)
    truncate(tmp_path / "4" / "meta" / "metadata")
    with caplog.at_level(logging.WARNING, "moresjax.runs.checkpoint"):
        assert_restored(tmp_path, 2)
    assert "checkpoint 4 is damaged" in caplog.text


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_intact_files_with_other_numbers_are_found_by_the_checksum(tmp_path, caplog, item):
    save(tmp_path / "run", 2, 4)
    save(tmp_path / "other", 4, seed=1)
    shutil.rmtree(tmp_path / "run" / "4" / item)
    shutil.copytree(tmp_path / "other" / "4" / item, tmp_path / "run" / "4" / item)
    with caplog.at_level(logging.WARNING, "moresjax.runs.checkpoint"):
        assert_restored(tmp_path / "run", 2)
    assert "checksums differ" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        truncate(array_file(tmp_path, step, "params"))
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        restore(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        checkpoints.restore_parameters()
    checkpoints.close()


def test_a_passed_over_checkpoint_is_replaced_by_the_next_save_of_its_step(tmp_path):
    save(tmp_path, 2, 4)
    truncate(array_file(tmp_path, 4, "params"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(make_state(0))
    checkpoints.save(make_state(4), {"next_index": 40})
    checkpoints.close()
    assert_restored(tmp_path, 4)


def test_saves_between_the_intact_and_the_damaged_step_are_kept(tmp_path):
    save(tmp_path, 2, 4)
    truncate(array_file(tmp_path, 4, "params"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(make_state(0))
    checkpoints.save(make_state(3), {"next_index": 30})
    checkpoints.close()
    assert_restored(tmp_path, 3)
