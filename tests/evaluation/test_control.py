"""What is counted of control, the variants that are asked, and the report."""

import dataclasses
import json

import pytest

from moresjax.core.errors import UserError
from moresjax.data.control.cases import NEGATIVE, OTHER, OWN, TARGET, Case, Scenario
from moresjax.data.control.questions import OBJECTS
from moresjax.data.control.source import ControlSource
from moresjax.data.region_providers import region_provider
from moresjax.evaluation.control.answers import (
    ALL,
    BASE,
    RANDOM,
    Answers,
    editor_groups,
    make_variants,
    place_regions,
)
from moresjax.evaluation.control.measure import Measured, correct, says
from moresjax.evaluation.control.run import ControlResult, measure_control, template_rephraser
from moresjax.reports.control import control_report, control_tables
from moresjax.testing.models import talking_model

TUNING = "loreft:positions=roi,rank=6,site=connector.out/loreft:positions=mark(indicator),layers=0"
OPTIONS = {"limit": 12, "subsets": False}
WHOLE = ((0.0, 0.0, 1.0, 1.0),)


def case(image, kind, name, shown, truth):
    question = OBJECTS.trained[0].ask(name)
    return Case(f"{image}:{kind}", kind, None, question, truth, truth, shown, WHOLE)


@pytest.fixture(scope="module")
def measured():
    """Cats that are denied, dogs that are not, and two wrong classes, one of which is lost."""
    cases = [
        case("a", TARGET, "cat", "cat", "Yes"),
        case("b", TARGET, "cat", "cat", "Yes"),
        case("c", OTHER, "dog", "dog", "Yes"),
        case("d", OTHER, "dog", "dog", "Yes"),
        case("a", NEGATIVE, "dog", "cat", "No"),
        case("c", NEGATIVE, "ship", "dog", "No"),
    ]
    answers = {
        BASE: ["Yes", "no.", "Yes", "No", "No", "No, it is"],
        ALL: ["No", "No", "No", "No", "No", "Yes"],
        "text": ["No", "Yes", "Yes", "Yes", "No", "No"],
    }
    return Measured(Scenario("misclassification", "cat"), cases, answers)


def means(rates):
    return {name: rate.mean for name, rate in rates.items() if rate is not None}


def test_rates_of_control_error_and_leakage(measured):
    assert means(measured.rates(ALL)) == {
        "control": 1.0,
        f"error {OTHER}": 1.0,
        f"leakage {OTHER}": 0.5,  # of two dogs one was denied before
        f"error {NEGATIVE}": 0.5,
        f"leakage {NEGATIVE}": 0.5,
    }
    assert measured.rates(BASE)["control"].mean == 0.5
    assert means(measured.base_errors()) == {"cat": 0.5, "dog": 0.5}
    assert means(measured.rates(ALL, "dog"))[f"error {NEGATIVE}"] == 1.0
    rate = measured.rates("text")["control"]
    assert rate.n == 2
    assert rate.interval95 == (0.0, 1.0)


def test_differences_are_paired_by_image(measured):
    mean, (low, high) = measured.differences("text")["control"]
    assert (mean, low, high) == (-0.5, -1.0, 0.0)
    assert measured.differences(ALL)["control"] == (0.0, (0.0, 0.0))


def test_misalignment_leaves_the_targets_own_question_open():
    cases = [
        case("a", TARGET, "dog", "cat", "No"),
        case("a", OWN, "cat", "cat", "Yes"),
        case("b", OTHER, "ship", "ship", "Yes"),
    ]
    answers = {BASE: ["No", "No", "Yes"], ALL: ["Yes", "Yes", "Yes"]}
    found = Measured(Scenario("misalignment", "cat", "dog"), cases, answers)
    assert found.rates(ALL)["control"].mean == 1.0
    assert means(found.base_errors()) == {"cat": 1.0, "ship": 0.0}
    assert found.rates(ALL)[f"error {OWN}"].mean == 0.0


def test_answers_are_read_by_their_first_words():
    assert says("No.", "No")
    assert not says("Nobody", "No")
    assert says("Not sure, it is blurred", "Not sure")
    several = dataclasses.replace(case("a", OTHER, "x", "x", ""), truth=("gum plus",) * 10)
    assert correct(several, "gum plus") == 1.0
    assert correct(several, "Not sure") == 0.0


def test_every_subset_and_the_random_region_are_asked():
    variants = make_variants(["visual", "connector", "text"])
    assert [v.name for v in variants] == [
        *(BASE, ALL, RANDOM, "visual", "connector", "text"),
        *("visual + connector", "visual + text", "connector + text"),
    ]
    assert [v.name for v in make_variants(["text"])] == [BASE, ALL]
    source = ControlSource("digits", split="test", target="three")
    cases = source.cases(30)
    moved = variants[2].cases(cases)
    assert sum(a.roi != b.roi for a, b in zip(cases, moved, strict=True)) > 30
    assert variants[1].cases(cases) == cases


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model's answers to a few scenes, and the folder that they are in."""
    model = talking_model("control:groups=connector;text")
    source = ControlSource("digits", split="test", target="three")
    out = tmp_path_factory.mktemp("control")
    options = OPTIONS | {"rephraser": template_rephraser(source), "out": out}
    return model, source, out, measure_control(model, source, **options)


def test_editors_change_what_is_said(asked):
    model, _, _, result = asked
    answers = result.measured.answers
    assert list(answers) == [BASE, ALL, RANDOM]
    assert answers[BASE] != answers[ALL]
    assert model.tuning == TUNING  # as before
    bare = talking_model()
    assert bare.generate(*prompt(result.measured.cases[0]), max_new_tokens=4) == answers[BASE][0]


def prompt(case):
    return case.prompt.text, case.image


def test_a_variant_has_its_editors_alone(asked, monkeypatch):
    model, source, *_ = asked
    said = []
    monkeypatch.setattr(Answers, "_ask", lambda self, variant, *_: said.append(model.tuning))
    answers, cases = Answers(model), source.cases(1)
    for variant in make_variants(editor_groups(model)):
        with pytest.raises(KeyError):
            answers.ask(variant, cases)
    connector, text = TUNING.split("/")
    assert said == ["none", TUNING, TUNING, connector, text]


@pytest.mark.parametrize(
    ("roi", "wanted"),
    [
        ("boxes", None),
        ("all", ((0.0, 0.0, 1.0, 1.0),)),
        ("center(50%)", ((0.25, 0.25, 0.75, 0.75),)),
        ("attention(1;20%)", 2),  # of nine patches
    ],
)
def test_a_models_own_regions_take_the_place_of_the_datas(asked, monkeypatch, roi, wanted):
    model, source, *_ = asked
    cases, prompts = source.cases(1), model.prompts
    processor = dataclasses.replace(prompts.processor, regions=region_provider(roi))
    monkeypatch.setattr(prompts, "saved_processor", processor)
    found = place_regions(model, cases)
    if isinstance(wanted, int):
        areas = [sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in one.roi) for one in found]
        assert areas == pytest.approx([wanted / 9] * len(found), abs=1e-3)
        assert all(one.roi != case.roi for one, case in zip(found, cases, strict=True))
    else:
        assert [one.roi for one in found] == [wanted or case.roi for case in cases]


def test_a_killed_run_asks_only_what_is_left(asked, monkeypatch):
    model, source, out, result = asked
    log = out / "predictions.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])
    rows = []
    generate = model.service.generate_many
    monkeypatch.setattr(
        model.service,
        "generate_many",
        lambda own, *args, **options: rows.extend(own) or generate(own, *args, **options),
    )
    options = OPTIONS | {"rephraser": template_rephraser(source), "out": out}
    again = measure_control(model, source, **options)
    assert len(rows) == 3
    assert again.to_dict() == result.to_dict()


def test_the_report_stands_beside_the_paper(asked, measured):
    _, _, out, result = asked
    files = control_report(result, out)
    assert all(path.stat().st_size > 500 for path in files)
    text = files[0].read_text()
    assert "Which editors act" in text
    assert "is {e} there ?" in text
    assert "test other ways to ask" in text  # the note on misuse
    saved = json.loads((out / "control.json").read_text())
    assert saved["data"]["target"] == "three"
    assert {"model", "processor", "seed", "n", "data_hash", "version"} <= {*saved}
    of_cifar = ControlResult(measured, [], {"data": {"phrasing": 2, "dataset": "cifar10"}})
    first, *_ = control_tables(of_cifar)
    assert first.title == "Table S9"
    assert first.rows[0][:3] == ["cat", "50.0% [0.0, 100.0]", "18.8%"]
    assert "not asked" in first.rows[0]


def test_a_target_that_is_never_asked_about_is_told(asked):
    model, source, *_ = asked
    with pytest.raises(UserError, match="none of the 2 questions is about the target 'three'"):
        measure_control(model, source, limit=1)
    with pytest.raises(UserError, match="tuning 'none' has no editors; tune it with --config"):
        measure_control(talking_model(), source, limit=12)
