"""Shift and steering in miniature, on models that were not trained."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moresjax.analysis.states import States
from moresjax.evaluation.steering.run import SteeringResult
from moresjax.evaluation.tasks import load_tasks
from moresjax.inference.load import load
from moresjax.studies import representations
from moresjax.studies.papers import STUDIES
from moresjax.studies.pipeline import Pipeline
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
untrained = functools.cache(talking_model)  # seeds share it, and what it has compiled


@dataclasses.dataclass(frozen=True)
class Untrained(Pipeline):
    """Two seeds of models that differ by their tuning."""

    out: Path = Path("nowhere")
    seeds: Sequence[int] = range(2)
    fast: bool = True

    def model(self, seed, name):
        return untrained("none" if name == "zero-shot" else "lora:rank=2")


@pytest.fixture(scope="module")
def numbers():
    model = load(BASE)
    tasks = load_tasks(["digits"], None, 2, "test")
    return steering_numbers(model, tasks, 14, "yes", "no", 0)


def test_every_layer_strength_and_control_has_a_number(numbers):
    names = {f"success layer {layer}" for layer in LAYERS} | {f"success {c}" for c in CONTROLS}
    names |= {"digits", *(f"probe layer {layer}" for layer in LAYERS)}
    names |= {f"{what} {alpha}" for what in ("success", "kept") for alpha in ("0.5", "1", "2")}
    names |= {"success n=10", "success one>three", "numbers before", "numbers after"}
    assert names == {*numbers}
    assert numbers[f"success layer {LAYERS[-1]}"] == numbers["success 1"]
    shares = [value for name, value in numbers.items() if name != "digits" and value is not None]
    assert all(np.isnan(share) or 0 <= share <= 1 for share in shares)
    assert not np.isnan([numbers["success n=10"], numbers["numbers after"]]).any()
    rows = representations._vector_table({name: [x] * 2 for name, x in numbers.items()}).rows
    assert len(rows) == 4


def test_vectors_of_other_answers_are_counted_by_the_answers_that_they_change():
    index = [{"id": str(n), "prediction": word} for n, word in enumerate(["one", "three", "yes"])]
    store = States.from_arrays({(representations.SITE, 1): np.eye(3, 4)}, index)
    trials = representations._more_trials(store, 1, ("yes", "one"), 0)
    np.testing.assert_array_equal(trials["few"].vector, [1, 0, -1, 0])
    np.testing.assert_array_equal(trials["one>three"].vector, [-1, 1, 0, 0])
    np.testing.assert_array_equal(trials["number"].vector, [0, 0.5, -0.5, 0])
    said = {"baseline": ["one .", "one", "yes", "no"]}
    said |= {trials["few"].key: ["one", "one", "one", "no"]}
    said |= {trials["one>three"].key: ["three .", "one", "yes", "three"]}
    said |= {trials["number"].key: ["two", "no", "six", "ten"]}
    result = SteeringResult([], {"task": said}, {})
    assert representations._more_numbers(result, trials, ("yes", "one")) == {
        "success n=10": 1.0,
        "success one>three": 0.5,
        "numbers before": 0.5,
        "numbers after": 0.5,
    }


def test_concepts_are_answers_by_their_samples_and_by_the_head():
    """The head's own rows are concepts whose first words are known."""
    model = talking_model()
    words = ["two", "seven"]
    head = np.asarray(model.mllm.llm.head.kernel[...])
    ids = [model.prompts.tokenizer.convert_tokens_to_ids(word) for word in words]
    vectors = head[:, ids].T / np.linalg.norm(head[:, ids], axis=0)[:, None]
    states = np.repeat(vectors, 3, axis=0)
    said = ["two", "two", "one", "seven", "seven", "seven"]
    index = [{"id": str(n), "prediction": f"{word} ."} for n, word in enumerate(said)]
    store = States.from_arrays({("llm.norm.out", 0): states}, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(representations, "ANSWER_CONCEPTS", 2)
        found = representations._answer_concepts(model, store, 0)
    assert found == {"purity": pytest.approx(5 / 6), "named": 2.0}


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
    study = dataclasses.replace(STUDIES["shift"], runs=STUDIES["shift"].runs[:2])
    outcome = study.make(Untrained(), study)
    for own in outcome.values.values():
        assert all(len(own[move]) == 2 for move in MOVES)
        assert own["own"] > own["original"]
        assert all(0 <= share <= 1 for move in MOVES for share in own[f"words {move}"])
    for table in outcome.tables:
        assert len(table.rows) == len(study.runs)
        assert all(len(row) == len(table.head) for row in table.rows)
    assert len(outcome.tables) == 3
    assert len(outcome.findings) == 2 * len(study.runs) + 1
