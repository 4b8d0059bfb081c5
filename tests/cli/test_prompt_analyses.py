"""`analyze lens`, `patch`, `attribute` and `causes`: numbers in JSON, figures beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moresjax as mj
from moresjax.cli import main
from moresjax.inference.load import load
from moresjax.inference.patching import patching

BASE = str(Path(__file__).parents[1] / "fixtures" / "v0_1" / "base")
PROMPT = "is there a two ?"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [str(folder / name) for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(path)
    return paths


def analyze(kind: str, out: Path, *arguments: object) -> int:
    common = ["--model", BASE, "--prompt", PROMPT, "--out", str(out), "--json"]
    return main(["analyze", kind, *common, *map(str, arguments)])


def files(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_layers_are_read_at_tokens_and_on_the_image(images, tmp_path, capsys):
    assert analyze("lens", tmp_path / "out", "--image", images[0], "--top", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "lens.json").read_text()) == found
    assert files(tmp_path / "out") == {"lens.json", "lens.png", "image1.png"}
    model = load(BASE)
    logits = model.logits(PROMPT, images[0])[0, -1]
    best = np.argsort(-logits)[:2]
    decode = model.prompts.tokenizer.decode
    assert found["top"][-1][-1] == found["words"] == [decode([i]) for i in best]
    wanted = logits[best] - np.logaddexp.reduce(logits)
    np.testing.assert_allclose(found["logprobs"][-1][-1], wanted, atol=1e-4)
    np.testing.assert_allclose(found["word_logprobs"][-1][-1], wanted, atol=1e-4)
    assert np.shape(found["grids"]) == (1, 2, 2, 4, 4)
    assert found["model"] == model.fingerprint


def test_images_are_swapped_layer_by_layer(images, tmp_path, capsys):
    options = ["--image", images[0], "--other-image", images[1], "--answers", "two,three"]
    assert analyze("patch", tmp_path / "out", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert files(tmp_path / "out") == {"patching.json", "patching.png"}
    assert found["columns"][1] == "<image 1>"
    assert found["corrupt"] == {"prompt": PROMPT, "images": [images[1]]}
    clean, corrupt = ((PROMPT, image) for image in images)
    wanted = patching(load(BASE), clean, corrupt, ("two", "three"))
    np.testing.assert_allclose(found["effect"], wanted.effect, atol=1e-4)
    assert found["effect"][-1][-1] == pytest.approx(1, abs=1e-3)


def test_an_answer_is_split_up(images, tmp_path, capsys):
    options = ["--image", images[0], "--answer", "two", "--against", "three"]
    assert analyze("attribute", tmp_path / "out", *options) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"attribution.json", "parts.png", "tokens.png", "image1.png"}
    assert files(tmp_path / "out") == names
    parts, model = found["parts"], load(BASE)
    logits = model.logits(PROMPT, images[0])[0, -1]
    two, three = model.prompts.tokenizer.convert_tokens_to_ids(["two", "three"])
    assert parts["logit"] == pytest.approx(float(logits[two] - logits[three]), abs=1e-4)
    layers = np.sum(parts["heads"]) + np.sum(parts["attention_rest"]) + np.sum(parts["mlps"])
    whole = parts["embedding"] + layers + np.sum(parts["edits"]) + parts["bias"]
    assert whole == pytest.approx(parts["logit"], abs=1e-4)
    assert np.shape(found["grids"]) == (1, 4, 4)
    assert len(found["scores"]) == len(found["tokens"])


def test_tokens_and_attention_are_taken_away(images, tmp_path, capsys):
    options = ["--image", images[0], "--answer", "two", "--removal", "swap"]
    options += ["--other-image", images[1], "--layers", "each", "--tau", 1, "--regions", "2x2"]
    assert analyze("causes", tmp_path / "out", *options, "--maps", "attention,random") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "causes.json").read_text()) == found
    names = {f"{name}.png" for name in ("effects", "knockouts", "pruning", "sinks", "image1")}
    assert files(tmp_path / "out") == {"causes.json", *names}
    model = load(BASE)
    value = model.score(PROMPT, ["two"], images[0])[0].logprob
    assert found["value"] == pytest.approx(value, abs=1e-4)
    own = {"removal": "swap", "other": images[1], "layers": "each", "regions": "2x2"}
    wanted = model.causes(PROMPT, images[0], answer="two", **own)
    np.testing.assert_allclose(found["effects"], wanted.effects, atol=1e-5)
    assert found["columns"] == wanted.columns
    knocked = mj.analyze.knockouts(model, PROMPT, images[0], answer="two")
    np.testing.assert_allclose(found["knockouts"]["effects"], knocked.effects, atol=1e-5)
    assert len(found["pruning"]["faithfulness"]) == 2
    sinks = mj.analyze.find_sinks(model, PROMPT, images[0], answer="two", tau=1)
    assert found["sinks"]["counts"] == sinks.counts.tolist()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("patch", [], "give --other-prompt or --other-image"),
        ("patch", ["--other-prompt", "the same ?", "--answers", "two"], "--answers takes two"),
        ("patch", ["--other-prompt", PROMPT, "--answers", "two,six"], "the same score"),
        ("lens", ["--top", "0"], "top must be from 1 to 37, got 0"),
        ("causes", [], "causes in an image need an image; give --image"),
        ("attribute", ["--method", "saliency"], "unknown method of attribution 'saliency'"),
    ],
)
def test_what_cannot_be_analysed_is_told(tmp_path, capsys, kind, options, message):
    assert analyze(kind, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
