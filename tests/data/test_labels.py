"""Images with labels from JSON: read, checked, trained on, and the encoder handed on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters
from moresjax.data.labels import LabelsSource
from moresjax.models.initialize import initialize
from moresjax.models.vision import PatchClassifier, VisionConfig
from moresjax.runs.build import build_model
from moresjax.runs.config import resolve
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.run_config import InitConfig, PartsConfig
from moresjax.testing.models import TINY_LLM, TINY_VISION
from moresjax.training.loop import train
from moresjax.training.objectives import patch_classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen dark and light pictures, and a file with a label for each."""
    root, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    records = []
    for number in range(16):
        light = number % 2
        pixels = rng.normal(60 + 120 * light, 10, (14, 12, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        records.append({"image": f"{number}.png", "label": ("dark", "light")[light]})
    (root / "labels.json").write_text(json.dumps({"data": records}))
    return root


def write(path, *records) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_classes_are_numbered_in_order(folder, tmp_path):
    source = LabelsSource(str(folder / "labels.json"), str(folder))
    assert (len(source), source.class_names) == (16, ("dark", "light"))
    assert source.label_counts == {"dark": 8, "light": 8}
    assert [source[i]["classes"].tolist() for i in (0, 3)] == [[[0]], [[1]]]
    assert source[3]["pixels"] == folder / "3.png"
    own = dataclasses.replace(source, classes="light;grey;dark")
    assert [own[i]["classes"].item() for i in (0, 3)] == [2, 0]
    numbers = [{"image": "0.png", "label": label} for label in (10, 9, -1)]
    more = write(tmp_path / "more.jsonl", *numbers)
    several = LabelsSource(f"{more};{more}", str(folder))
    assert several.class_names == ("-1", "9", "10")
    assert [several[i]["classes"].item() for i in range(6)] == [2, 1, 0] * 2


def test_patches_have_labels_or_none(folder, tmp_path):
    grid = [["sky", "sky", None], ["cat", "sky", "cat"]]
    source = LabelsSource(
        write(tmp_path / "g.json", {"image": "0.png", "labels": grid}), str(folder)
    )
    assert source[0]["classes"][:, 0].tolist() == [1, 1, -1, 0, 1, 0]
    assert source.filler["classes"][:, 0].tolist() == [-1] * 6


GOOD = {"image": "0.png", "label": "dark"}
BAD = [
    ({"image": "0.png"}, r"either `label` or `labels`"),
    ({"label": "dark"}, r"a record has an `image`"),
    (GOOD | {"labels": [["dark"]]}, r"either `label` or `labels`"),
    ({"image": "0.png", "labels": [["dark"], []]}, r"rows of equally many labels"),
    ({"image": "0.png", "labels": [["dark", "dark"]]}, r"are 1 x 2, those of others 1 x 1"),
    ({"image": "0.png", "label": 1.5}, r"a text or a whole number, got 1.5"),
    ({"image": "../0.png", "label": "dark"}, r"outside of the image root"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_wrong_record_is_named(folder, tmp_path, record, message):
    path = write(tmp_path / "bad.jsonl", GOOD, GOOD | {"label": "light"}, record)
    source = LabelsSource(path, str(folder))
    with pytest.raises(UserError, match=rf"sample bad.jsonl\[2\]: .*{message}"):
        source[2]


def test_sources_that_cannot_train_are_refused(folder, tmp_path):
    one, file = write(tmp_path / "one.jsonl", GOOD), str(folder / "labels.json")
    for options, message in (
        ({"files": one}, "two classes at least are needed, got dark"),
        ({"files": file, "classes": "dark;dark"}, "name a label twice"),
        ({"files": file, "image_root": str(tmp_path / "none")}, "none is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            LabelsSource(**{"image_root": str(folder)} | options)
    unknown = LabelsSource(file, str(folder), classes="dark;grey")
    with pytest.raises(UserError, match="label 'light' is none of the classes dark, grey"):
        unknown[1]


def test_the_loss_is_over_labelled_patches():
    model = PatchClassifier(VisionConfig(**TINY_VISION), (3,))
    initialize(model, 0)
    pixels = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    (logits,) = jax.jit(model)(pixels)
    loss = jax.jit(functools.partial(patch_classes, model))
    whole = loss({"pixels": pixels, "classes": jnp.asarray([[[2]], [[-1]]])})
    expected = -jax.nn.log_softmax(logits[0])[:, 2].sum()
    assert float(whole.total) == pytest.approx(float(expected), rel=1e-6)
    assert (float(whole.weight), float(whole.tokens)) == (9, 18)
    labels = np.full((2, 9, 1), -1)
    labels[0, 4], labels[1, 8] = 1, 0
    some = loss({"pixels": pixels, "classes": labels})
    chosen = optax.softmax_cross_entropy_with_integer_labels(
        jnp.stack([logits[0, 4], logits[1, 8]]), jnp.asarray([1, 0])
    )
    assert float(some.total) == pytest.approx(float(chosen.sum()), rel=1e-6)
    assert float(some.weight) == 2
    with pytest.raises(UserError, match="an image has 4 labels, but the vision encoder has 9 pat"):
        loss({"pixels": pixels, "classes": labels[:, :4]})


def config_of(folder, **changes):
    data = {"name": "labels", "files": str(folder / "labels.json"), "image_root": str(folder)}
    vision = TINY_VISION | {"feature_layer": -1}
    values = {
        "objective": "patch_classes",
        "also_train": ("vision", "head"),
        "model": {"vision": vision, "classes": (2,)},
        "data": data,
        "batch_size": 8,
        "steps": 12,
        "optimizer": {"lr": 1e-2},
        "tensorboard": False,
    }
    return resolve(values | changes)


def test_a_tower_is_trained_and_taken_by_a_later_run(folder, tmp_path):
    broken = [{"image": "none.png", "label": "dark"}, {"image": "also.png", "label": "light"}]
    files = f"{folder / 'labels.json'};{write(tmp_path / 'broken.jsonl', *broken)}"
    config = config_of(folder, on_bad_sample="skip")
    config = dataclasses.replace(config, data=dict(config.data) | {"files": files})
    result = train(config, tmp_path / "run")
    assert result.metrics["accuracy"] > 0.9
    skipped = json.loads((tmp_path / "run" / "skipped_samples_0.json").read_text())
    assert skipped["skipped"] == 2
    trained = trained_parameters(tmp_path / "run")
    later = dataclasses.replace(
        config,
        objective="next_token",
        tokenizer="digits",
        model=PartsConfig(llm=TINY_LLM | {"vocab_size": 37}, vision=config.model.vision),
        init=InitConfig(vision=str(tmp_path / "run")),
    )
    theirs = named_parameters(build_model(later))
    ours = {name: x for name, x in trained.items() if name.startswith("vision.")}
    assert ours
    for name, values in ours.items():
        np.testing.assert_array_equal(theirs[name].get_value(), values)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((3,), r"model.classes is \(3,\), but the labels need \(2,\): dark, light"),
        ((), "patch_classes needs model.classes, the number of classes of every label"),
    ],
)
def test_other_classes_than_the_models_are_refused(folder, tmp_path, classes, message):
    vision = TINY_VISION | {"feature_layer": -1}
    with pytest.raises(UserError, match=message):
        train(config_of(folder, model={"vision": vision, "classes": classes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_are_checked(folder, tmp_path, capsys):
    odd = {"image": "none.png", "label": "dark"}
    path = write(tmp_path / "more.jsonl", GOOD, GOOD | {"label": "light"}, odd)
    command = ["data", "check", "--workers", "1", "--files", str(folder / "labels.json"), path]
    assert main([*command, "--image-root", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "labels.json: labels\n16 samples" in printed
    assert "labels: dark 8, light 8\ntoo long: 0; bad: 0; cut: 0\n" in printed
    assert "labels: dark 2, light 1\ntoo long: 0; bad: 1; cut: 0\nsample more.jsonl[2]" in printed
