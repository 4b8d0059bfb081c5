"""Runs on LLaVA files: packed and bucketed batches, skipped samples, exact resumption."""

import json
import shutil

import numpy as np
import pytest
from run_helpers import curve

from moresjax.core.errors import UserError
from moresjax.runs.config import base_config
from moresjax.runs.init_weights import trained_parameters
from moresjax.testing.llava_files import conversation, make_images, make_records, write_list
from moresjax.testing.models import TINY_LLM, TINY_VISION
from moresjax.training.loop import train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = make_records(make_images(folder / "images", 6), 30)
    records[8]["image"] = "none.png"
    config = base_config()
    config.tokenizer, config.template = "digits", "bare"
    small = {"num_layers": 1, "unroll": True}
    config.model.llm = TINY_LLM | small | {"vocab_size": 37}
    config.model.vision = TINY_VISION | small
    files = write_list(folder / "mix.json", records)
    config.data = {"name": "llava", "files": files, "image_root": str(folder / "images")}
    config.update(
        {"max_seq_len": 96, "images_per_row": 4, "batch_size": 8, "steps": 4, "log_every": 4}
    )
    config.update({"pack_window": 13, "tensorboard": False, "on_bad_sample": "skip"})
    config.checkpoint.every = 2
    return config


def with_settings(config, **settings):
    config = config.copy_and_resolve_references()
    config.update(settings)
    return config


def test_a_packed_run_goes_on_exactly(config, tmp_path):
    packed = with_settings(config, batching="pack", buckets=(48,))
    train(packed, tmp_path / "whole")
    # What the directory was after step 2.
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    (tmp_path / "moved" / "train.json").unlink()
    assert train(packed, tmp_path / "moved").step == 4
    seen = [curve(tmp_path / name, "samples_seen") for name in ("whole", "moved")]
    assert seen[0] == seen[1]
    assert seen[0][-1] > 4 * 8  # several samples share a row
    wanted, found = (trained_parameters(tmp_path / name) for name in ("whole", "moved"))
    assert set(found) == set(wanted)
    for name, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted[name]), err_msg=name)
    report = json.loads((tmp_path / "whole" / "skipped_samples_0.json").read_text())
    assert report["skipped"] == 1
    assert "none.png does not exist" in report["samples"]["8"]


def test_a_run_of_an_epoch_shows_every_sample_once(config, tmp_path):
    settings = {"batching": "bucket", "steps": 0, "epochs": 1, "log_every": 1}
    result = train(with_settings(config, **settings), tmp_path)
    # Of 30 samples one is bad; its place and the tails of both kinds are padding.
    assert result.metrics["samples_seen"] == 29
    assert result.metrics["epoch"] == pytest.approx(29 / 30)
    assert curve(tmp_path, "samples_seen") == list(np.cumsum(curve(tmp_path, "samples")))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["steps"], saved["samples"], saved["epochs"]) == (result.step, 0, 0)
    assert train(with_settings(config, **settings), tmp_path) == result  # nothing is left to do


def test_a_run_says_at_its_start_how_many_samples_are_cut(config, tmp_path, monkeypatch, caplog):
    talk = conversation("how many ?", "two")
    all_rounds = (talk, [{"from": "gpt", "value": "one"}, *talk], talk * 2)
    files = write_list(tmp_path / "cut.json", [{"conversations": made} for made in all_rounds])
    data = {"name": "llava", "files": files, "image_root": str(tmp_path)}
    monkeypatch.setattr(
        "moresjax.training.prepare.build_model", None
    )  # what is called after the data
    with pytest.raises(TypeError):
        train(with_settings(config, template="plain", data=data), tmp_path / "run")
    told = [each.getMessage() for each in caplog.records if "go without" in each.getMessage()]
    assert told == [
        f"1 of 3 samples go without their turns {which}; `moresjax data check` lists them"
        for which in ("before the first question", "after the first")
    ]


def test_a_bad_sample_ends_a_run_that_does_not_skip(config, tmp_path):
    with pytest.raises(UserError, match=r"sample mix\.json\[8\] 0008: "):
        train(with_settings(config, on_bad_sample="raise", batching="pack"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": "stack"}, "batching 'stack'; choose from: pad, pack, bucket"),
        ({"on_bad_sample": "mask"}, "on_bad_sample 'mask'; choose from: raise, skip"),
        ({"batching": "bucket", "buckets": (0,)}, "buckets must be at least 1, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"pack_window": -1}, "pack_window must be at least 0, got -1"),
    ],
)
def test_settings_of_the_data_are_checked_before_the_model_is_built(
    config, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr("moresjax.training.prepare.build_model", None)
    with pytest.raises(UserError, match=message):
        train(with_settings(config, **settings), tmp_path)
    assert not list(tmp_path.iterdir())
