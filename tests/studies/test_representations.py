"""Shift and steering in miniature, on models that were not trained."""

import dataclasses
from pathlib import Path

import pytest

from moresjax.evaluation.tasks import load_tasks
from moresjax.inference.load import load
from moresjax.studies import representations
from moresjax.studies.papers import STUDIES
from moresjax.studies.representations import (
    CONTROLS,
    MOVES,
    caption_numbers,
    caption_task,
    steering_numbers,
)
from moresjax.testing.models import talking_model

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"
LAYERS = (0, 1)


@dataclasses.dataclass
class Untrained:
    """Two seeds of models that differ by their tuning."""

    seeds = range(2)
    fast = True

    def model(self, seed, name):
        return talking_model("none" if name == "zero-shot" else "lora:rank=2")


@pytest.fixture(scope="module")
def numbers():
    model = load(BASE)
    tasks = load_tasks(["digits"], None, 2, "test")
    return steering_numbers(model, tasks, 14, "yes", "no", 0)


def test_every_layer_strength_and_control_has_a_number(numbers):
    names = {f"success layer {layer}" for layer in LAYERS} | {f"success {c}" for c in CONTROLS}
    names |= {"digits", *(f"probe layer {layer}" for layer in LAYERS)}
    names |= {f"{what} {alpha}" for what in ("success", "kept") for alpha in ("0.5", "1", "2")}
    assert names == {*numbers}
    assert numbers[f"success layer {LAYERS[-1]}"] == numbers["success 1"]
    shares = [value for name, value in numbers.items() if name != "digits" and value is not None]
    assert all(0 <= share <= 1 for share in shares)


def test_captions_are_steered_to_words_and_scored(monkeypatch):
    model, task = talking_model(), caption_task("test", 3)
    scene = task.examples[0]
    assert {tuple(sorted(text.split())) for text in scene.answer} == {
        tuple(sorted(scene.answer[0].split()))  # the same cells and digits in another order
    }
    said = model.generate(scene.prompt, scene.images, max_new_tokens=9).split()
    monkeypatch.setattr(representations, "STYLE", f"{said[-1]};zero")
    numbers = caption_numbers(model, task, 6, 0)
    names = ("0", "0.5", "1", "2", *CONTROLS)
    assert {*numbers} == {f"caption {key} {name}" for key in ("words", "cider") for name in names}
    assert numbers["caption words 2"] > numbers["caption words reversed"]
    table = representations._caption_table({name: [x, x] for name, x in numbers.items()})
    assert len(table.rows) == len(names)


def test_shifts_stand_beside_their_controls():
    study = STUDIES["shift"]
    outcome = study.make(Untrained(), study)
    for own in outcome.values.values():
        assert all(len(own[move]) == 2 for move in MOVES)
        assert own["own"] > own["original"]
    (table,) = outcome.tables
    assert len(table.rows) == len(study.runs)
    assert all(len(row) == len(table.head) for row in table.rows)
    assert len(outcome.findings) == len(study.runs) + 1
