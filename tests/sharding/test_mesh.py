"""Every mesh computes what one device computes, with arrays where the rules put them."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moresjax.core.errors import UserError
from moresjax.runs.checkpoint import named
from moresjax.runs.config import load_config
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.run_config import OptimizerConfig
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import (
    SPLIT_FROM,
    batch_sharding,
    make_mesh,
    mesh_preset,
    parameter_shardings,
    replicated,
    shard_params,
)
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model
from moresjax.training.loop import train
from moresjax.training.objectives import next_token
from moresjax.training.optimizer import make_optimizer
from moresjax.training.prepare import place_optimizer
from moresjax.training.step import make_train_step, split_model

DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"
MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 4},
]
CASES = {"mores": "mores:rank=1,positions=image", "full": "full"}
STEPS = 2


@functools.cache
def parts(case: str):
    """Definition, trainable and frozen part on the host, where no step can donate them."""
    # The last layer's MoReS has no gradient: one layer would not do.
    layers = 2 if case == "mores" else 1
    model = tiny_model(CASES[case], vocab_size=32, num_layers=layers, unroll=True)
    graphdef, trainable, frozen = split_model(model, ("connector",))
    return graphdef, *jax.tree.map(np.asarray, (trainable, frozen))


def start(case: str, mesh):
    graphdef, trainable, frozen = parts(case)
    # A large epsilon keeps Adam smooth where a gradient is zero but for rounding.
    config = OptimizerConfig(schedule="constant", warmup=0.0, lr=1e-2, eps=1e-3)
    optimizer, schedule = make_optimizer(config, STEPS, trainable)
    trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    state = TrainState(zero, trainable, place_optimizer(optimizer, trainable, mesh))
    step = make_train_step(graphdef, next_token, optimizer, schedule)
    places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return state, frozen, step


def run(case: str, mesh):
    """State and the metrics of every step after a few steps."""
    state, frozen, step = start(case, mesh)
    measured = []
    for number in range(STEPS):
        batch = jax.device_put(tiny_batch(rows=8, seed=number), batch_sharding(mesh))
        state, metrics = step(state, frozen, batch)
        measured.append({name: float(value) for name, value in metrics.items()})
    return state, measured


@functools.cache
def on_one_device(case: str):
    state, measured = run(case, make_mesh(devices=jax.devices()[:1]))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.trainable, parts(case)[1])
    assert max(jax.tree.leaves(moved)) > 1e-3
    return {name: np.asarray(x) for name, x in named(state.trainable).items()}, measured


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_mesh_computes_what_one_device_computes(case, mesh):
    wanted, wanted_metrics = on_one_device(case)
    state, measured = run(case, make_mesh(**mesh))
    for got, want in zip(measured, wanted_metrics, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    for name, array in named(state.trainable).items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-5, rtol=0, err_msg=name)


# ---- Where arrays go.


def test_parameters_are_split_where_the_rules_say_so():
    state, _, _ = start("full", make_mesh(data=2, fsdp=2, tensor=2))
    arrays = named(state.trainable)
    wanted = {
        "llm.blocks.attn.q.kernel": ((None, "fsdp", "tensor"), (1, 8, 8)),
        "llm.blocks.attn.k.kernel": ((None, "fsdp", "tensor"), (1, 8, 4)),
        "llm.blocks.attn.o.kernel": ((None, "tensor", "fsdp"), (1, 8, 8)),
        "llm.blocks.mlp.up.kernel": ((None, "fsdp", "tensor"), (1, 8, 12)),
        "llm.blocks.mlp.down.kernel": ((None, "tensor", "fsdp"), (1, 12, 8)),
        "llm.embed.table": (("tensor", "fsdp"), (16, 8)),
        "llm.head.kernel": (("fsdp", "tensor"), (8, 16)),
        "llm.norm.scale": (("fsdp",), (8,)),
        "connector.layers.1.kernel": ((None, "fsdp"), (16, 8)),
        "connector.layers.1.bias": (("fsdp",), (8,)),
    }
    for name, (spec, shape) in wanted.items():
        assert tuple(arrays[name].sharding.spec) == spec, name
        shards = arrays[name].addressable_shards
        assert len(shards) == 8
        assert {shard.data.shape for shard in shards} == {shape}, name


def test_the_frozen_part_is_split_too():
    _, frozen, _ = start("mores", make_mesh(data=1, fsdp=8))
    kernel = frozen.llm.blocks.attn.q.kernel.get_value()
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2, 16)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_moments_follow_their_parameters(mesh):
    state, _, _ = start("full", make_mesh(**mesh))
    for moment in ("mu", "nu"):
        moments = named(optax.tree_utils.tree_get(state.opt_state, moment))
        for name, array in named(state.trainable).items():
            assert moments[name].sharding.is_equivalent_to(array.sharding, array.ndim), name


@pytest.mark.parametrize(("mesh", "rows"), zip(MESHES, (1, 1, 2, 4), strict=True), ids=str)
def test_batches_are_split_by_row(mesh, rows):
    batch = jax.device_put(tiny_batch(rows=8), batch_sharding(make_mesh(**mesh)))
    for array in jax.tree.leaves(batch):
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert shapes == {(rows, *array.shape[1:])}


def spec_of(shape, mesh, **metadata):
    """The spec of a parameter of this shape, as a tuple without trailing None."""
    variable = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), **metadata)
    chosen = parameter_shardings(nnx.State({"x": variable}), mesh)
    return chosen["x"].get_value().spec


def test_a_rule_that_does_not_divide_is_left_out():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    axes = ("embed", "vocab")
    assert spec_of((16, 32), mesh, axes=axes) == PartitionSpec("fsdp", "tensor")
    assert spec_of((16, 29), mesh, axes=axes) == PartitionSpec("fsdp", None)
    assert spec_of((18, 32), mesh, axes=axes) == PartitionSpec(None, "tensor")
    assert spec_of((3, 16, 32), mesh, axes=axes) == PartitionSpec(None, "fsdp", "tensor")


def test_unnamed_parameters_are_split_only_when_large():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    assert spec_of((SPLIT_FROM // 8, 4), mesh) == PartitionSpec()
    assert spec_of((2, SPLIT_FROM), mesh) == PartitionSpec(None, "fsdp")
    assert spec_of((3, SPLIT_FROM + 1), mesh) == PartitionSpec()


# ---- Sizes.


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 8)),
    ],
)
def test_one_size_may_be_left_open(sizes, wanted):
    assert tuple(make_mesh(**sizes).shape.values()) == wanted
    assert tuple(make_mesh(**sizes).shape) == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    "sizes",
    [(3, 1, 1), (16, 1, 1), (4, 1, 1), (-1, 3, 1), (-1, 16, 1), (-1, -1, 1), (0, 8, 1), (-2, 4, 1)],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*sizes)


# ---- A whole run.


def run_config(**mesh):
    changes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 4, "num_layers": 1}
    config = load_config(
        f"{DIGITS}:stage=llm",
        [f"model.llm.{key}={value}" for key, value in changes.items()]
        + [f"mesh.{key}={value}" for key, value in mesh.items()]
        + ["steps=4", "checkpoint.every=2", "batch_size=8", "tensorboard=false", "log_every=4"]
        + ["optimizer.eps=1e-3"],
    )
    return config


def test_a_run_may_be_resumed_on_another_mesh(tmp_path):
    train(run_config(data=2, fsdp=2, tensor=2), tmp_path / "whole")
    # What the directory was after step 2.
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    (tmp_path / "moved" / "train.json").unlink()

    result = train(run_config(data=8), tmp_path / "moved")
    assert result.step == 4
    wanted = trained_parameters(tmp_path / "whole")
    half = (tmp_path / "moved" / "checkpoints").glob("[0-9]*")
    assert sorted(path.name for path in half) == ["2", "4"]
    found = trained_parameters(tmp_path / "moved")
    assert set(found) == set(wanted)
    for name, array in found.items():
        np.testing.assert_allclose(
            np.asarray(array), np.asarray(wanted[name]), atol=1e-5, rtol=0, err_msg=name
        )


@pytest.mark.parametrize(
    ("name", "devices", "sizes"),
    [
        ("replicated", 8, (8, 1, 1)),
        ("fsdp", 8, (1, 8, 1)),
        ("fsdp+tensor", 8, (1, 4, 2)),
        ("fsdp+tensor", 64, (1, 16, 4)),
    ],
)
def test_presets_use_every_device(name, devices, sizes):
    assert tuple(mesh_preset(name, devices).values()) == sizes


def test_unknown_presets_are_refused():
    with pytest.raises(UserError, match="choose from: replicated, fsdp, fsdp"):
        mesh_preset("zero3", 8)
    with pytest.raises(UserError, match="multiple of 2 devices, got 7"):
        mesh_preset("fsdp+tensor", 7)
