"""Going on: with more steps, from other paths, and never from what is something else."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from run_helpers import HEAD, assert_equal_weights, config_of, logged, rewind

from moresjax.core.errors import UserError
from moresjax.runs.identity import _frozen_digest
from moresjax.runs.init_weights import trained_parameters
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.models import tiny_model
from moresjax.training.loop import train
from moresjax.training.step import split_model

CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup": 0.0}


def head_config(**changes):
    return config_of(
        "stage=llm", HEAD | CONSTANT | {"checkpoint.every": 2, "data.size": 64} | changes
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps with checkpoints of 2 and 4; tests copy it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(head_config(), workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_more_steps_continue_a_finished_run_as_if_it_had_never_ended(finished, run, tmp_path):
    longer = dataclasses.replace(head_config(log_every=1), steps=0, samples=48)  # 8 a step
    assert train(longer, run).step == 6
    assert train(head_config(steps=6), run).step == 6
    assert [line["step"] for line in logged(run)] == [4, 5, 6]
    train(head_config(steps=6), tmp_path / "whole")
    assert_equal_weights(run, tmp_path / "whole")
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    assert json.loads((run / "train.json").read_text())["step"] == 6
    before = trained_parameters(finished)
    assert any((before[name] != x).any() for name, x in trained_parameters(run).items())


def test_fewer_steps_than_were_taken_are_refused(run):
    with pytest.raises(UserError, match="has trained 4 steps already, more than the 3 of"):
        train(head_config(steps=3), run)


def test_a_finished_run_keeps_its_weights(tmp_path):
    for keep in (0, -1):
        with pytest.raises(UserError, match=f"checkpoint.keep must be at least 1, got {keep}"):
            train(head_config(**{"checkpoint.keep": keep}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- What a checkpoint belongs to.


def test_settings_are_compared_with_those_of_the_checkpoint(run):
    """Whatever has become of config.json."""
    rewind(run, 2)
    path = run / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"a run with other settings \((data.seed, )?seed\)"):
        train(head_config(seed=1), run)


def test_other_frozen_parts_are_refused(finished, run, tmp_path):
    """The same path and settings, and another file behind them."""
    settings = {"init.llm": str(tmp_path / "llm"), "also_train": "llm.blocks"}
    shutil.copytree(finished, tmp_path / "llm")
    shutil.rmtree(run)
    train(head_config(**settings), run)
    rewind(run, 2)
    shutil.rmtree(tmp_path / "llm")
    train(head_config(steps=2, **{"optimizer.lr": 0.5}), tmp_path / "llm")
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"the frozen parts of .*run are not those that its checkp"):
        train(head_config(**settings), run)
    assert (run / "config.json").read_bytes() == before
    # The same weights elsewhere are the same parts.
    shutil.copytree(finished, tmp_path / "moved")
    assert train(head_config(**settings | {"init.llm": str(tmp_path / "moved")}), run).step == 4


def test_other_samples_are_refused(run, tmp_path, monkeypatch):
    from moresjax.runs import identity

    rewind(run, 2)
    monkeypatch.setattr(identity, "_digest", lambda value: "other")
    with pytest.raises(UserError, match=r"the (frozen parts|tokenizer) of .*run are not those"):
        train(head_config(), run)


def without_identity(run: Path) -> None:
    """Makes of a run what version 0.2 wrote."""
    for path in (run / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(path.read_text())
        del meta["identity"]
        path.write_text(json.dumps(meta))


def test_a_run_without_identity_resumes_from_the_paths_it_had(finished, run, tmp_path):
    without_identity(run)
    rewind(run, 2)
    with pytest.raises(UserError, match=r"other settings \(init\.llm\)"):
        train(head_config(**{"init.llm": str(tmp_path)}), run)
    assert train(head_config(), run).step == 4
    assert_equal_weights(run, finished)


@pytest.mark.parametrize("spec", [("fsdp",), (("data", "fsdp"),), ()])
def test_a_digest_is_the_same_on_any_mesh(spec):
    frozen = split_model(tiny_model("mores:layers=1"), ("connector",))[2]
    wanted = _frozen_digest(frozen)
    mesh = make_mesh(data=2, fsdp=4)

    def placed(x):
        sizes = {"data": 2, "fsdp": 4}
        names = spec[0] if spec and isinstance(spec[0], tuple) else spec
        parts = int(np.prod([sizes[name] for name in names]))
        fits = x.ndim and parts > 1 and x.shape[-1] % parts == 0
        own = PartitionSpec(*[None] * (x.ndim - 1), spec[0]) if fits else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, own))

    assert _frozen_digest(jax.tree.map(placed, frozen)) == wanted
    half = jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == "float32" else x, frozen)
    assert _frozen_digest(half) == wanted
    other = jax.tree.map(lambda x: x, frozen)
    first, _ = nnx.to_flat_state(other)[0]
    flat = dict(nnx.to_flat_state(other))
    flat[first] = flat[first].replace(flat[first].get_value() * 1.5 + 1)
    assert _frozen_digest(nnx.from_flat_state(list(flat.items()))) != wanted
