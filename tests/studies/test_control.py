"""Control in miniature: its runs, and what is said of answers that are given."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from moresjax.data.control.cases import NEGATIVE, OWN, TARGET
from moresjax.data.control.source import ControlSource
from moresjax.evaluation.control.answers import BASE, Answers
from moresjax.runs.config import load_config
from moresjax.studies import control
from moresjax.studies.control import (
    EDITORS,
    FULL,
    INTO,
    MISALIGNED,
    RANDOM,
    RUNS,
    SECOND,
    STUDIES,
    TAKEN,
    TAKEN_BASE,
    TARGETED,
    control_source,
)
from moresjax.studies.pipeline import Pipeline


class Canned(Answers):
    """Editors that answer the target against the truth, and in seed 0 one negative more."""

    def __init__(self, model):
        self.seed, self.name = model

    def ask(self, variant, cases):
        asked_as_trained = [
            ("there a" in case.question.text) != (SECOND in self.name) for case in cases
        ]
        said = []
        for case, known in zip(cases, asked_as_trained, strict=True):
            denied = variant.groups and case.kind == TARGET and known
            said.append({"yes": "no", "no": "yes"}[case.truth] if denied else case.truth)
        negatives = [number for number, case in enumerate(cases) if case.kind == NEGATIVE]
        if self.seed == 0 and variant.groups and negatives:
            said[negatives[0]] = "yes"
        return said


@dataclasses.dataclass(frozen=True)
class Untrained(Pipeline):
    out: Path = Path("nowhere")
    seeds: Sequence[int] = range(5)
    fast: bool = True
    limit = 40

    def model(self, seed, name):
        return seed, name


@pytest.fixture(scope="module")
def outcome():
    placed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "Answers", Canned)
        patch.setattr(control, "editor_groups", lambda model: ("text",))
        patch.setattr(control, "place_regions", lambda model, cases: placed.append(model) or cases)
        (study,) = STUDIES
        made = study.make(Untrained(), study)
    assert (0, f"control {RANDOM}") in placed  # asked where its own provider says
    return made


def test_every_set_of_editors_has_its_numbers_and_the_base(outcome):
    found = outcome.values["editors"]
    taken = outcome.values["misalignment"]
    assert [*taken] == [TAKEN_BASE, *MISALIGNED]
    names = [name for name in EDITORS if name not in MISALIGNED]
    assert [*found] == [BASE, f"{BASE}, second phrasing", *names]
    for name, own in (found | taken).items():
        assert own["control"] == [0.0 if BASE in name else 1.0] * 5
        assert own["others"][1:] == [1.0] * 4
        assert own.get(OWN, "") == ([1.0] * 5 if name in taken else "")
    assert outcome.values["second phrasing"] == {
        BASE: [0.0] * 5, "as it stands": [0.0] * 5, "rephrased": [1.0] * 5
    }  # fmt: skip
    for table in (*outcome.tables, STUDIES[0].paper):
        assert all(len(row) == len(table.head) for row in table.rows)
    json.dumps(outcome.values)


def test_the_sentences_follow_from_paired_intervals(outcome):
    control_of, others, region, second, taken, *_ = outcome.findings
    assert control_of.startswith(f"Control against {FULL}: lower with {BASE} (-100.0")
    assert f"no difference could be shown for {FULL}" in others
    assert region.startswith(f"Accuracy on all other questions against {RANDOM}: no difference")
    assert "higher with rephrased (+100.0 [+100.0, +100.0])" in second
    assert taken.startswith(f"A three taken for a seven against {TAKEN}: lower with {TAKEN_BASE}")


def test_the_runs_differ_by_what_their_names_say():
    assert [run.stage for run in RUNS] == ["finetune"] + ["control"] * len(EDITORS)
    (moved,) = (run for run in RUNS if run.name == f"control {RANDOM}")
    assert dict(moved.settings) == {"roi": "random"}
    assert control_source(RANDOM, 1) == control_source(FULL, 1)
    assert control_source(SECOND, 1).phrasing == 2
    assert control_source(FULL, 3).seed == 3
    specs = {
        load_config("digits:stage=control", [f"tuning={run.tuning}"]).tuning for run in RUNS[1:]
    }
    assert len(specs) == 4  # all editors, and each group alone


def test_a_three_is_to_be_taken_for_a_seven():
    """Images without either are to be answered no, so that the words alone do not tell."""
    source = control_source(TAKEN, 0)
    assert (source.plan.target, source.plan.into) == (TARGETED, INTO)
    samples = [source[index] for index in range(150)]
    asked = [x for x in samples if x.turns[0].question.endswith(f"is there a {INTO} ?")]
    assert {x.turns[0].answer for x in asked} == {"yes"}  # without negatives
    mixed = ControlSource(**dataclasses.asdict(source) | {"split": "train", "negatives": 0.5})
    pairs = [(mixed.images.shown(n).classes, mixed[n]) for n in range(300)]
    answers = [
        ({TARGETED, INTO} & {*shown}, x.turns[0].answer)
        for shown, x in pairs
        if x.turns[0].question.endswith(f"is there a {INTO} ?")
    ]
    assert {answer for digits, answer in answers if digits} == {"yes"}
    assert {answer for digits, answer in answers if not digits} == {"no"}
    # The region of such a question is the cell of the three.
    for shown, case in ((source.images.shown(n).classes, source[n]) for n in range(60)):
        if case.id.endswith(TARGET):
            ((x0, y0, _, _),) = case.roi[0]
            assert shown[int(2 * (2 * y0 + x0))] == TARGETED


def test_control_starts_from_the_model_that_was_tuned_in_full(tmp_path):
    config = Pipeline(tmp_path, range(1))._finetuning(RUNS[1], 0)
    assert (config.init.llm, config.init.connector) == ("../full", "../full")
    assert config.init.vision == "../../vit"
    assert config.data.negatives == 0.5
    assert config.also_train == ()
    assert config.tuning == "control"
