"""Several runs at once: each equals its run alone, shares its program, and ends alone."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from run_helpers import HEAD, TEXT_ONLY, assert_same_bits, compilations, config_of, logged

from moresjax.core.errors import UserError
from moresjax.runs.checkpoint import named
from moresjax.runs.init_weights import trained_parameters
from moresjax.training import many
from moresjax.training.loop import train
from moresjax.training.many import train_many
from moresjax.training.widths import split_widths

# Dropout needs each run's own key; the frozen weights of another seed are others.
TUNED = TEXT_ONLY | {"tuning": "lora:rank=2,dropout=0.3,targets=q", "also_train": "llm.head"}
RATES = {"seed": 1, "optimizer.lr": 1e-2, "optimizer.schedule": "linear"}
DECAY = {"optimizer.weight_decay": 0.1, "optimizer.clip": 0.0}


def tuned(**changes):
    return config_of("stage=llm", TUNED | {"steps": 50, "log_every": 25} | changes)


def head(**changes):
    return config_of("stage=llm", HEAD | changes)


def assert_same_parameters(one, other):
    found, wanted = trained_parameters(one), trained_parameters(other)
    assert set(found) == set(wanted)
    for key, x in wanted.items():
        limit = 1e-6 * np.abs(x).max()
        np.testing.assert_allclose(found[key], x, rtol=0, atol=limit, err_msg=key)


def assert_same_logs(one, other):
    for found, wanted in zip(logged(one), logged(other), strict=True):
        assert found["lr"] == pytest.approx(wanted["lr"], rel=1e-6)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_runs_that_differ_in_seed_and_rate_have_the_bits_of_runs_alone(tmp_path):
    train_many({tmp_path / "rates": tuned(**RATES), tmp_path / "other": tuned(steps=60)})
    train(tuned(**RATES), tmp_path / "alone")
    assert_same_bits(tmp_path / "rates", tmp_path / "alone")
    assert_same_logs(tmp_path / "rates", tmp_path / "alone")


def test_runs_that_differ_in_decay_and_clip_equal_runs_alone_but_for_rounding(tmp_path):
    train_many({tmp_path / "decay": tuned(**DECAY), tmp_path / "other": tuned(steps=1)})
    train(tuned(**DECAY), tmp_path / "alone")
    assert_same_parameters(tmp_path / "decay", tmp_path / "alone")
    assert_same_logs(tmp_path / "decay", tmp_path / "alone")


def test_runs_of_a_shape_compile_one_step(tmp_path, caplog):
    runs = {
        tmp_path / str(seed): head(seed=seed, **{"optimizer.lr": 1e-3 + seed}) for seed in (0, 1)
    }
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        train_many(runs)
    assert compilations(caplog).count("jit(step)") == 1


RANKED = {
    "mores": (
        "mores:rank=3,layers=1,positions=all,init=identity",
        "mores:rank=4,positions=all,init=identity",
    ),
    "lora": ("lora:rank=2,alpha=4,targets=q", "lora:rank=3,targets=q,layers=0"),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks_and_layers_share_a_program(name, tmp_path, caplog):
    small, large = (
        tuned(tuning=spec, **{"model.llm.num_layers": 2, "optimizer.lr": 1e-2})
        for spec in RANKED[name]
    )
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        train_many({tmp_path / "small": small, tmp_path / "large": large})
    assert compilations(caplog).count("jit(step)") == 1
    assert "1 program for 2 runs" in caplog.messages
    train(small, tmp_path / "alone")
    assert_same_parameters(tmp_path / "small", tmp_path / "alone")


def test_ranks_have_programs_of_their_own_where_bits_count():
    shared, runs = many._Shared(share_ranks=False), [tuned(tuning=s) for s in RANKED["mores"]]
    shared.configs = [*runs, tuned(tuning=RANKED["mores"][0].replace("=1,", "=0,"))]
    assert shared._alike(runs[0]) == [runs[0], shared.configs[-1]]
    assert many._Shared()._settings(runs[0]) == many._Shared()._settings(runs[1])


def test_what_keeps_runs_from_sharing_a_program_is_said():
    def told(*settings, **options):
        return many._Shared(**options).describe_programs([tuned(**own) for own in settings])

    ranks = [{"tuning": spec} for spec in RANKED["lora"]]
    assert told({"seed": 1}, {"optimizer.lr": 1}, DECAY) == "1 program for 3 runs"
    assert told(*ranks) == "1 program for 2 runs"
    specs = ", ".join(RANKED["lora"])
    assert told(*ranks, share_ranks=False) == f"2 programs for 2 runs: tuning ({specs})"
    layers = {"model.llm.num_layers": 2, "optimizer.b2": 0.9} | ranks[1]
    wanted = "2 programs for 3 runs: model.llm.num_layers (1, 2), optimizer.b2 (0.98, 0.9)"
    assert told(ranks[0], ranks[1], layers) == wanted
    many_sizes = [{"batch_size": 8 * n} for n in range(1, 7)]
    assert told(*many_sizes) == "6 programs for 6 runs: batch_size (8, 16, 24, 32, ...)"


def test_only_methods_of_one_kind_share_a_program():
    def kind(spec):
        return split_widths(spec)[0]

    assert kind("adapter:bottleneck=2,layers=0") == kind("adapter:bottleneck=5")
    assert kind("mores:rank=1/lora:rank=2") == kind("mores:rank=8/lora:rank=4")
    assert kind("lora:rank=2,rslora=true") != kind("lora:rank=4,rslora=true")  # another scale
    assert kind("lora:rank=2,alpha=8") != kind("lora:rank=4,alpha=8")
    assert kind("mores:rank=2,positions=image") != kind("mores:rank=2")
    assert kind("oft:block_size=2") != kind("oft:block_size=4")


def test_runs_that_no_program_fits_together_have_one_each(tmp_path, caplog):
    runs = {tmp_path / "one": head(steps=1), tmp_path / "two": head(steps=2, batch_size=16)}
    with caplog.at_level(logging.DEBUG), jax.log_compiles():
        outcomes = train_many(runs)
    assert [outcome.state for outcome in outcomes.values()] == ["done", "done"]
    assert compilations(caplog).count("jit(step)") == 2
    assert "2 programs for 2 runs: batch_size (8, 16)" in caplog.messages


def test_equal_frozen_weights_are_held_once():
    shared = many._Shared()

    def frozen(seed: int) -> dict[str, jax.Array]:
        values = {"same": jnp.ones(3), "own": jnp.full(3, seed)}
        state = nnx.State({name: nnx.Param(x) for name, x in values.items()})
        return named(shared._known(state))

    one, other = frozen(0), frozen(1)
    assert other["same"] is one["same"]
    assert other["own"].tolist() == [1, 1, 1]


def test_a_mistake_is_told_before_anything_is_written(tmp_path):
    runs = {tmp_path / "runs" / "good": head(), tmp_path / "runs" / "bad": head(batch_size=12)}
    with pytest.raises(UserError, match="batch_size 12"):
        train_many(runs)
    assert not (tmp_path / "runs").exists()
