"""Folders and settings of pipelines, without training any."""

import dataclasses
import logging
from pathlib import Path

import jax
import pytest
from run_helpers import compilations

from moresjax.studies.more_tokens_and_layers import LAYERS, TOKENS
from moresjax.studies.pipeline import STAGES, Pipeline, _merged
from moresjax.testing.models import talking_model


@pytest.mark.parametrize(
    ("variant", "own", "key", "value"),
    [
        (TOKENS, {"vit", "pretrain"}, "patch_size", 4),
        (LAYERS, {"llm", "pretrain"}, "num_layers", 8),
    ],
)
def test_a_variant_has_stages_of_its_own_only_where_they_differ(variant, own, key, value):
    pipeline = Pipeline(Path("runs"), (0,), variant=variant)
    plain = Pipeline(Path("runs"), (0,))
    for stage in STAGES:
        folder = pipeline.folder(0, stage)
        assert (folder != plain.folder(0, stage)) == (stage in own)
    config = pipeline._config("finetune,tuning=full", 0, "finetune", "full").to_dict()
    assert value in (config["model"]["llm"].get(key), config["model"]["vision"].get(key))
    folder = pipeline.folder(0, "full")
    for part, stage in (("llm", "llm"), ("vision", "vit"), ("connector", "pretrain")):
        found = (folder / config["init"][part]).resolve()
        assert found == pipeline.folder(0, stage).resolve()


def test_the_plain_pipeline_has_the_paths_of_the_recipe():
    pipeline = Pipeline(Path("runs"), (3,))
    config = pipeline._config("pretrain", 3, "pretrain", "pretrain")
    assert (config.init.llm, config.init.vision, config.seed) == ("../llm", "../vit", 3)


def test_methods_that_cannot_be_merged_are_asked_as_they_are():
    model = talking_model("adapter:bottleneck=2")
    assert _merged(model) is model
    assert _merged(talking_model("lora:rank=2")).tuning == "none"


def test_answers_to_a_single_task_are_asked_once(tmp_path):
    pipeline = Pipeline(tmp_path, (0,), scenes=2)
    folder = pipeline.folder(0, "adapter")
    folder.mkdir(parents=True)
    (folder / "train.json").write_text("{}")
    model = talking_model("adapter:bottleneck=2")
    found = pipeline.scores(0, "adapter", model, only="digits_count")
    assert {name: entry["n"] for name, entry in found["scores"].items()} == {"digits_count": 2}
    # What is there is read: there is no model to load.
    assert pipeline.scores(0, "adapter", only="digits_count") == found
    more = dataclasses.replace(pipeline, scenes=3)
    assert more.scores(0, "adapter", model, only="digits_count")["scores"]["digits_count"]["n"] == 3


@pytest.mark.parametrize("tuning", ["mores:rank=1,positions=image", "lora:rank=2"])
def test_a_second_seed_of_a_method_compiles_nothing(tuning, tmp_path, caplog):
    pipeline, compiled, answers = Pipeline(tmp_path, (0, 1), scenes=1), [], []
    for seed in pipeline.seeds:
        folder = pipeline.folder(seed, "method")
        folder.mkdir(parents=True)
        (folder / "train.json").write_text("{}")
        model = talking_model(tuning, seed=seed, intermediate_size=20)  # a shape of its own
        caplog.clear()
        with caplog.at_level(logging.DEBUG), jax.log_compiles():
            answers.append(pipeline.scores(seed, "method", model)["attention"]["share"])
        compiled.append(compilations(caplog))
    assert "jit(prefill)" in compiled[0]
    assert compiled[1] == []
    assert answers[0] != answers[1]
