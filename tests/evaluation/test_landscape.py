"""Landscapes of runs: the centre is the validation loss; killed ones go on; meshes agree."""

import dataclasses
import json

import numpy as np
import pytest
from run_helpers import TINY, config_of, curve

from moresjax.analysis import landscape as landscape_module
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.landscape import loss as loss_module
from moresjax.evaluation.landscape import run as run_module
from moresjax.evaluation.landscape.run import LandscapeOptions, measure_landscapes
from moresjax.runs.run_config import ValidationConfig
from moresjax.sharding.mesh import make_mesh
from moresjax.training.loop import train

SETTINGS = TINY | {
    "steps": 2,
    # Behind the only block the edit of an image moves no answer; landscapes have no dropout.
    "tuning": "mores:rank=2,positions=all,dropout=0.5",
    **{f"validation.data.{k}": v for k, v in {"name": "digits", "task": "instruct"}.items()},
    **{"validation.data.split": "val", "validation.data.size": 12},
    "validation.every": 2,
}
OPTIONS = LandscapeOptions(points=3, pairs=1, samples=12, batch_size=8, chunk=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("landscape") / "run"
    train(config_of("stage=finetune", SETTINGS), workdir)
    return workdir


PROGRAM = landscape_module._losses


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    out, compiled = tmp_path_factory.mktemp("landscape") / "out", PROGRAM._cache_size()
    result = measure_landscapes({"a": run}, out, OPTIONS)
    assert PROGRAM._cache_size() == compiled + 1  # for three chunks
    return out, result


def losses(result, name="a", pair=0):
    return np.array(result["models"][name]["pairs"][pair]["losses"])


def test_the_centre_is_the_validation_loss(run, measured):
    _, result = measured
    (wanted,) = curve(run, "validation_loss")
    assert result["models"]["a"]["centre"] == pytest.approx(wanted, rel=1e-6)
    assert losses(result)[1, 1] == result["models"]["a"]["centre"]
    assert (result["n"], result["split"]) == (12, "validation")
    assert result["notes"] == ["fewer than 3 pairs of directions are no evidence of a difference"]
    bend = np.array(result["models"]["a"]["pairs"][0]["curvature"])
    np.testing.assert_allclose(bend, bend.T, rtol=1e-3, atol=1e-5)


def test_a_small_grid_bends_as_the_curvature_says(run, measured):
    compiled = PROGRAM._cache_size()
    result = measure_landscapes({"a": run}, None, dataclasses.replace(OPTIONS, span=0.1))
    assert PROGRAM._cache_size() == compiled  # another grid of the same run is the same program
    near, bend = losses(result), np.array(measured[1]["models"]["a"]["pairs"][0]["curvature"])
    second = (near[0, 1] - 2 * near[1, 1] + near[2, 1]) / 0.1**2
    assert second == pytest.approx(bend[0, 0], rel=0.1, abs=2e-3)


def test_a_killed_measurement_goes_on(run, measured, tmp_path, monkeypatch):
    out, whole = measured
    lines = (out / "points.jsonl").read_text().splitlines()
    assert len(lines) == 4  # three chunks and the curvature
    (tmp_path / "points.json").write_text((out / "points.json").read_text())
    (tmp_path / "points.jsonl").write_text("\n".join([lines[0], lines[2], lines[1][:20]]))
    added = []
    keep = run_module.PointStore.add
    monkeypatch.setattr(
        run_module.PointStore, "add", lambda self, *row: (added.append(row[2]), keep(self, *row))
    )
    found = measure_landscapes({"a": run}, tmp_path, OPTIONS)
    assert added == [3, -1]
    assert found == whole
    assert json.loads((tmp_path / "landscape.json").read_text()) == json.loads(json.dumps(whole))
    # Nothing is left to do, whatever the model is called.
    again = measure_landscapes({"b": run}, tmp_path, OPTIONS)
    assert added == [3, -1]
    assert again["models"]["b"] == whole["models"]["a"]
    with pytest.raises(UserError, match="holds points with seed=0, not 1; choose another folder"):
        measure_landscapes({"a": run}, tmp_path, dataclasses.replace(OPTIONS, seed=1))
    (tmp_path / "points.json").unlink()
    with pytest.raises(UserError, match="is not empty; the landscape needs a new folder"):
        measure_landscapes({"a": run}, tmp_path, OPTIONS)


def test_devices_and_cached_images_change_nothing(run, measured, monkeypatch):
    monkeypatch.setattr(run_module, "curvature", lambda *_: np.zeros((2, 2)))
    wanted = losses(measured[1])
    mesh = make_mesh(data=2, fsdp=4)
    found = measure_landscapes({"a": run}, None, OPTIONS, mesh=mesh)
    np.testing.assert_allclose(losses(found), wanted, rtol=2e-5)
    monkeypatch.setattr(loss_module, "trains_vision", lambda _: True)
    found = measure_landscapes({"a": run}, None, OPTIONS)
    np.testing.assert_allclose(losses(found), wanted, rtol=1e-6)


def test_the_command_draws_and_says_what_means_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "curvature", lambda *_: np.eye(2))
    out = tmp_path / "out"
    options = ["--points", "3", "--pairs", "2", "--samples", "4", "--batch-size", "8"]
    command = ["analyze", "landscape", *options, "--model", f"x={run}", "--model", f"y={run}"]
    assert main([*command, "--normalize", "none", "--split", "training", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "normalize=none means nothing here" in told
    assert "the samples are of the training data of x" in told
    assert "1 [1, 1]" in told
    files = {path.name for path in out.iterdir()}
    assert files == {
        "points.json",
        "points.jsonl",
        "landscape.json",
        "contours.png",
        "surfaces.png",
    }
    assert main([*command[:-1], f"x={run}", "--out", str(tmp_path / "two")]) == 2
    assert "two models have the name 'x'" in capsys.readouterr().err
    assert main([*command[:2], "--model", str(tmp_path), "--out", str(tmp_path / "no")]) == 2
    assert "is no run's directory" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_runs_that_cannot_be_compared_are_told(run, monkeypatch):
    config = run_module.read_config(run / "config.json")
    configs = {"a": config, "b": dataclasses.replace(config, objective="own")}
    configs["c"] = dataclasses.replace(config, validation=ValidationConfig())
    monkeypatch.setattr(run_module, "_config", configs.get)
    with pytest.raises(UserError, match="a was trained for next_token, b for own; their losses"):
        measure_landscapes({"a": "a", "b": "b"}, None, OPTIONS)
    with pytest.raises(UserError, match="run c has no validation data; give --split training"):
        measure_landscapes({"c": "c"}, None, dataclasses.replace(OPTIONS, split="validation"))
    with pytest.raises(UserError, match="split of a landscape 'test'; choose from"):
        LandscapeOptions(split="test")
    with pytest.raises(UserError, match="pairs must be at least 1, got 0"):
        LandscapeOptions(pairs=0)
