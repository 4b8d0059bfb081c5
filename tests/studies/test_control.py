"""Control in miniature: its runs, and what is said of answers that are given."""

import json

import pytest

from moresjax.data.control.cases import NEGATIVE, TARGET
from moresjax.evaluation.control.answers import BASE
from moresjax.runs.config import load_config
from moresjax.studies import control
from moresjax.studies.control import EDITORS, FULL, RANDOM, RUNS, SECOND, STUDIES, control_source
from moresjax.studies.pipeline import Pipeline


class Canned:
    """Editors that deny the target, and in seed 0 one negative more than none."""

    def __init__(self, model):
        self.seed, self.name = model

    def ask(self, variant, cases):
        asked_as_trained = [
            ("there a" in case.question.text) != (SECOND in self.name) for case in cases
        ]
        said = []
        for case, known in zip(cases, asked_as_trained, strict=True):
            denied = variant.groups and case.kind == TARGET and known
            said.append("no" if denied else case.truth)
        negatives = [number for number, case in enumerate(cases) if case.kind == NEGATIVE]
        if self.seed == 0 and variant.groups and negatives:
            said[negatives[0]] = "yes"
        return said


class Untrained:
    seeds, limit, fast = range(5), 40, True

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
    assert [*found] == [BASE, f"{BASE}, second phrasing", *EDITORS]
    for name, own in found.items():
        assert own["control"] == [0.0 if BASE in name else 1.0] * 5
        assert own["others"][1:] == [1.0] * 4
    assert outcome.values["second phrasing"] == {
        BASE: [0.0] * 5, "as it stands": [0.0] * 5, "rephrased": [1.0] * 5
    }  # fmt: skip
    for table in (*outcome.tables, STUDIES[0].paper):
        assert all(len(row) == len(table.head) for row in table.rows)
    json.dumps(outcome.values)


def test_the_sentences_follow_from_paired_intervals(outcome):
    control_of, others, region, second = outcome.findings
    assert control_of.startswith(f"Control against {FULL}: lower with {BASE} (-100.0")
    assert f"no difference could be shown for {FULL}" in others
    assert region.startswith(f"Accuracy on all other questions against {RANDOM}: no difference")
    assert "higher with rephrased (+100.0 [+100.0, +100.0])" in second


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


def test_control_starts_from_the_model_that_was_tuned_in_full(tmp_path):
    config = Pipeline(tmp_path, range(1))._finetuning(RUNS[1], 0)
    assert (config.init.llm, config.init.connector) == ("../full", "../full")
    assert config.init.vision == "../../vit"
    assert config.data.negatives == 0.5
    assert config.also_train == ()
    assert config.tuning == "control"
