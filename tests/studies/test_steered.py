"""Figure 8, appendix A.4 and runtimes, on models that were not trained."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moresjax.cli import main
from moresjax.studies import steered
from moresjax.studies.papers import STUDIES
from moresjax.studies.pipeline import Pipeline
from moresjax.studies.steered import norm_ratios, steered_below, visual_attention, whole_map
from moresjax.testing.models import talking_model

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"


untrained = functools.cache(talking_model)  # seeds share it, and what it has compiled


@dataclasses.dataclass(frozen=True)
class Untrained(Pipeline):
    """Two seeds of models that differ by their tuning."""

    out: Path = Path("nowhere")
    seeds: Sequence[int] = range(2)
    fast: bool = True
    scenes: int = 1

    def model(self, seed, name):
        kinds = {"mores r=1": "mores:positions=image,rank=1", "mores r=4": "mores:positions=image"}
        return untrained(kinds.get(name, "none"))


@pytest.fixture(scope="module")
def model():
    return talking_model("mores:rank=2,positions=image")


@pytest.fixture(scope="module")
def questions():
    return steered._questions(Untrained())


def test_edits_can_be_off_from_a_layer_on(model, questions):
    prompts, images = [questions[0].prompt], [questions[0].images]
    bare = talking_model("none")
    on = model.run(prompts, images).logits
    with steered_below(model, 0):
        off = model.run(prompts, images).logits
        assert np.array_equal(off, bare.run(prompts, images).logits)
    assert not np.array_equal(on, off)
    assert np.array_equal(on, model.run(prompts, images).logits)


def test_norms_are_those_after_and_before_the_edit(model, questions):
    found = norm_ratios(model, questions[:2])
    method, site = dict(model.mllm.tuning.methods)["mores"], "llm.block.out"
    params = {n: x[0] for n, x in model.mllm.tuning.params["mores"][site].items()}
    prompts, images = [q.prompt for q in questions[:2]], [q.images for q in questions[:2]]
    with steered_below(model, 0):
        before = model.run(prompts, images, read=site).states[site][0]
    row = model.prompts.row(prompts[0], images[0])
    before = before[:, np.flatnonzero(np.asarray(row.image) >= 0)]
    after = before + np.asarray(method.delta(method.prepare(params), jnp.asarray(before)))
    wanted = (np.linalg.norm(after, axis=-1) / np.linalg.norm(before, axis=-1)).mean()
    assert found[0] == pytest.approx(wanted, rel=1e-4)


def test_maps_are_whole_and_causal(model, questions):
    maps, groups = whole_map(model, questions[0])
    assert maps.shape[1:] == (len(groups),) * 2
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert not np.triu(maps, 1).any()
    own = visual_attention(model, questions[:1])[:, 0]
    places = [n for n, group in enumerate(groups) if group == "image"]
    np.testing.assert_allclose(own, maps[:, -2, places], rtol=1e-4)


@pytest.mark.parametrize("name", ["fig8", "a4"])
def test_a_study_has_a_number_of_every_layer(name):
    study = STUDIES[name]
    study = dataclasses.replace(study, runs=study.runs[:2] if name == "a4" else study.runs[1:2])
    outcome = study.make(Untrained(), study)
    for table in outcome.tables:
        assert all(len(row) == len(table.head) for row in table.rows), table.title
    assert all("no difference could be shown" in said for said in outcome.findings)
    json.dumps(outcome.values)


def test_runtimes_are_measured_beside_no_tuning(monkeypatch):
    monkeypatch.setattr(steered, "SPECS", {"none": "none", "mores": "mores:positions=image"})
    outcome = STUDIES["runtimes"].make(Untrained(), STUDIES["runtimes"])
    added = outcome.values["added_milliseconds"]
    assert set(added) == {"none", "mores"}
    assert added["none"] == [0.0, 0.0]
    assert all(np.isfinite(added["mores"]))


def test_overhead_of_a_users_model(capsys):
    command = ["analyze", "overhead", "--model", str(BASE), "--prompt", "how many ?"]
    command += ["--rows", "1", "--rounds", "2", "--new-tokens", "3", "--try", "lora:rank=1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["none", "lora:rank=1"]
    own = found["lora:rank=1"]
    assert len(own["prefill"]) == len(own["decode"]) == 2
    assert found["none"]["added"] == 0
    assert main([*command, "--new-tokens", "1"]) == 2
    assert "two new tokens" in capsys.readouterr().err
