"""What is said about methods follows from paired intervals over whole-pipeline seeds."""

import re

import numpy as np
import pytest
from scipy import stats

from moresjax.configs import digits as recipe
from moresjax.data.digits import FAMILIES, UNSEEN
from moresjax.runs.run_config import resolve
from moresjax.studies.demo import add_differences, findings
from moresjax.studies.findings import PairedDifference, compare_with, explain
from moresjax.studies.pipeline import STAGES, ZERO_SHOT, Finetuning, Pipeline
from moresjax.studies.provenance import commit, describe, provenance

BASE = [0.70, 0.78, 0.74, 0.71, 0.77]


def results_of(gains: dict[str, list[float]], base=BASE) -> dict:
    """Results of a demo whose methods gain so much over connector-only training, seed by seed."""
    methods = {}
    for name, spec in {ZERO_SHOT: "none", **recipe.METHODS}.items():
        means = [b + g for b, g in zip(base, gains.get(name, [0.0] * len(base)), strict=True)]
        scores = {family: means for family in FAMILIES}
        methods[name] = {
            "tuning": spec,
            "mean_by_seed": means,
            "accuracy_by_seed": scores,
            "visual_share_by_seed": [0.5] * len(base),
        }
    results = {"seeds": len(base), "unseen": UNSEEN, "methods": methods}
    add_differences(results)
    return results


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 6))
    found = PairedDifference.of(list(one), list(other))
    wanted = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(one - other))
    assert found.interval95 == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ([0.03, 0.02, 0.03, 0.02, 0.03], "higher"),
        ([-0.03, -0.02, -0.03, -0.02, -0.03], "lower"),
        ([0.05, -0.03, 0.04, 0.03, -0.02], ""),  # a higher mean, but not in every seed
        ([0.0] * 5, ""),
    ],
)
def test_a_direction_is_said_where_the_interval_excludes_zero(gain, word):
    results = results_of({"mores r=4": gain})
    sentence = findings(results)[1]
    for direction in ("higher", "lower"):
        said = re.findall(rf"{direction} with ([^;]*)", sentence)
        assert ("mores r=4" in "".join(said)) == (direction == word), sentence
    assert ("mores r=4" in sentence.partition("could be shown")[2]) == (not word)
    entry = results["methods"]["mores r=4"]["from_connector_only"]["mean"]
    assert entry["mean"] == pytest.approx(np.mean(gain))


@pytest.mark.parametrize("seeds", [1, 4])
def test_few_seeds_show_nothing(seeds):
    results = results_of({"full": [0.2 + 0.001 * n for n in range(seeds)]}, BASE[:seeds])
    first, *sentences = findings(results)
    assert "no difference" in first
    assert "--seeds 5" in first
    assert not any(word in " ".join(sentences) for word in ("higher", "lower"))
    assert "no difference" not in explain(5)


def test_a_comparison_lists_every_other_method():
    sentence = compare_with("a", "Score", {"a": BASE, "b": [0.9] * 5, "c": BASE, "d": [0.1] * 5})
    assert re.match(r"Score against a: higher with b \(.*\); lower with d \(.*\); no ", sentence)
    assert sentence.endswith("for c (+0.0 [+0.0, +0.0]).")


def test_every_stage_of_a_seed_is_that_seeds_own(tmp_path):
    pipeline = Pipeline(tmp_path, (0, 3))
    for method, spec in recipe.METHODS.items():
        config = resolve(pipeline._finetuning(Finetuning(method, spec), 3))
        assert (config.seed, config.data["seed"]) == (3, 3)
        workdir = pipeline.folder(3, method)
        for part, stage in zip(("llm", "vision", "connector"), STAGES, strict=True):
            place = (workdir / config.init.source(part)).resolve()
            assert place == pipeline.folder(3, stage) == tmp_path / "seed3" / stage
    config = recipe.get_config("stage=pretrain,seed=3")
    assert (tmp_path / "seed3" / "pretrain" / config.init.llm).resolve() == tmp_path / "seed3/llm"
    settings = {"data.size": 64, "steps": 7}
    config = pipeline._finetuning(Finetuning("few", "lora", settings), 0)
    assert (config.data["size"], config.steps) == (64, 7)


def test_numbers_say_what_they_were_made_with(tmp_path):
    facts = provenance()
    line = describe(facts)
    for word in (facts["version"], facts["versions"]["jax"], f"{facts['machine']['cores']} cores"):
        assert str(word) in line
    assert commit(tmp_path) is None
    assert "commit unknown" in describe(facts | {"commit": None})
