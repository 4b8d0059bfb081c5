"""A model of MiniGPT-v2's shape, four patches a visual token: trained, read, exported."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import TINY, cli_arguments

from moresjax.analysis.states import States
from moresjax.cli import main
from moresjax.data.digits import make_scene
from moresjax.inference.analyze import attention_map
from moresjax.inference.load import load
from moresjax.inference.model import Model

# EVA has a class token, no biases of keys and a norm behind it; 64 patches are 16 tokens.
EVA = {
    "patch_size": 4,
    "class_token": True,
    "k_bias": False,
    "feature_norm_eps": 1e-5,
}
SHAPE = {f"model.vision.{key}": value for key, value in EVA.items()}
SETTINGS = TINY | SHAPE | {"model.connector": "concat4-linear", "steps": 3, "log_every": 3}
SETTINGS |= {"also_train": "()", "optimizer.lr_by_component": "", "max_seq_len": 96}
QUESTION = "is there a two ?"
IMAGE = make_scene(np.random.default_rng(0), "test").image
GRID = (8, 2)
EDITS = {"adapter": "", "pyreft": "mores:positions=image"}


def trained(folder: Path, tuning: str) -> Path:
    arguments = cli_arguments("stage=finetune", folder, SETTINGS | {"tuning": tuning})
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("minigpt") / "mrt", "mrt")


@pytest.fixture(scope="module")
def model(run) -> Model:
    return load(run)


@pytest.fixture(scope="module")
def questions(run) -> Path:
    Image.fromarray(IMAGE).save(run.parent / "scene.png")
    record = {"image": "scene.png", "question": QUESTION, "answer": "yes", "max_new_tokens": 1}
    file = run.parent / "own.jsonl"
    file.write_text(json.dumps(record))
    return file


def test_maps_have_a_place_for_every_joined_token(model, run, questions, tmp_path):
    """Of a call, and of `evaluate --attention`, which reads answers again."""
    assert model.config.visual_tokens == 16
    found = attention_map(model, QUESTION, IMAGE, max_new_tokens=1)
    assert found.grid.shape == (1, 1, *GRID)
    assert 0 < found.grid.sum() < 1
    asked = ["--model", str(run), "--tasks", str(questions), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *asked, "--attention"]) == 0
    with np.load(tmp_path / "out" / "attention_maps.npz") as arrays:
        np.testing.assert_allclose(arrays["0.grid"], found.grid.mean(1), atol=1e-5)


def test_attention_is_analysed(run, questions, tmp_path, capsys):
    asked = ["--model", str(run), "--tasks", str(questions), "--out", str(tmp_path / "out")]
    assert main(["analyze", "attention", *asked, "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert summary["samples"] == 1
    assert sum(summary["share"][0]) == pytest.approx(1, abs=1e-4)


def test_states_are_kept_in_a_folder(model, tmp_path):
    """The mean over joined tokens, and states of the LLM."""
    items, out = [{"prompt": QUESTION, "images": IMAGE}], tmp_path / "out"
    sites = ["connector.out", "llm.block.out"]
    states = model.states(items, site=sites, take="prompt", out=out)
    seen = model.run(QUESTION, IMAGE, read=sites).states
    np.testing.assert_allclose(
        States(out).matrix("connector.out")[0], seen["connector.out"][0].mean(0), atol=1e-5
    )
    np.testing.assert_allclose(
        states.matrix("llm.block.out", 0)[0], seen["llm.block.out"][0, 0, -1], atol=1e-5
    )


def exported(run: Path, form: str) -> Path:
    out = run.parent / f"{run.name}-{form}"
    assert main(["export", str(run), str(out), "--format", form]) == 0
    return out


def test_what_was_trained_goes_where_the_formats_have_a_place(model, run, tmp_path, capsys):
    logits = np.asarray(model.logits(QUESTION, IMAGE))
    again = load(run, tuning="none")
    assert np.abs(np.asarray(again.logits(QUESTION, IMAGE)) - logits).max() > 1e-5
    again.load_adapter(str(exported(run, "adapter")))
    np.testing.assert_allclose(again.logits(QUESTION, IMAGE), logits, atol=1e-5)
    mores = trained(run.parent / "mores", "mores:rank=1,positions=image")
    logits = load(mores).logits(QUESTION, IMAGE)
    for form in ("adapter", "pyreft"):
        again = load(mores, tuning="none")
        again.load_adapter(str(exported(mores, form)), allow_pickle=True, edits=EDITS[form])
        np.testing.assert_allclose(again.logits(QUESTION, IMAGE), logits, atol=1e-5)
    capsys.readouterr()
    # No LLaVA of transformers joins tokens.
    for form in ("hf", "merged", "tinyllava"):
        out = tmp_path / form
        assert main(["export", str(run), str(out), "--format", form]) == 2
        error = capsys.readouterr().err
        assert "concat4-linear" in error, error
        assert "use format adapter" in error, error
        assert error.count("\n") == 1
        assert not out.exists()
