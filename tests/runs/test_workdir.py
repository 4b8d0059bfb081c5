"""A run's directory as a model: with its own tuning, with another one, and from pickled parts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.runs import workdir as workdir_module
from moresjax.runs.checkpoint import named
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.workdir import load_workdir

RUNS = Path(__file__).parents[1] / "fixtures" / "v0_1"
WORKDIR = RUNS / "mores"


def parameters(**options) -> dict:
    model, processor = load_workdir(WORKDIR, **options)
    assert processor is not None
    return named(nnx.state(model, nnx.Param))


def changed(one: dict, other: dict) -> set[str]:
    """Names of parameters that both have with other values."""
    return {name for name in set(one) & set(other) if not np.array_equal(one[name], other[name])}


def test_a_run_has_its_own_tuning():
    own = parameters()
    trained = trained_parameters(WORKDIR)
    assert all(np.array_equal(own[name], x) for name, x in trained.items())


def test_the_same_spec_keeps_what_trained():
    own, again = parameters(), parameters(tuning="mores:positions=image,rank=1")
    assert set(own) == set(again)
    assert not changed(own, again)


def test_another_spec_is_fresh_and_the_connector_stays_trained():
    own, other = parameters(), parameters(tuning="mores:rank=2,positions=image")
    tuned = {name for name in own if name.startswith("tuning.")}
    assert tuned == {name for name in other if name.startswith("tuning.")}
    assert all(own[name].shape != other[name].shape for name in tuned if "bias" in name)
    assert changed(own, other) <= tuned
    base = named(nnx.state(load_workdir(RUNS / "base")[0], nnx.Param))
    assert any("connector" in name for name in changed(base, other))


def test_no_tuning_is_the_base_with_the_trained_connector():
    own, bare = parameters(), parameters(tuning="none")
    assert {name for name in own if not name.startswith("tuning.")} == set(bare)
    assert not changed(own, bare)


@pytest.mark.parametrize("spec", ["morse", "mores:rank=1,layers=7"])
def test_a_spec_that_does_not_fit_is_refused(spec):
    with pytest.raises(UserError):
        load_workdir(WORKDIR, tuning=spec)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickled_base_parts_are_read_on_request_only(tmp_path, monkeypatch, allow_pickle):
    workdir = shutil.copytree(WORKDIR, tmp_path / "run")
    asked = []
    monkeypatch.setattr(workdir_module, "load_parts", lambda *_, **options: asked.append(options))
    load_workdir(workdir, allow_pickle=allow_pickle)
    assert [options["folders"].allow_pickle for options in asked] == [allow_pickle]
