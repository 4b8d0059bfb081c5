"""What is counted of control, the variants that are asked, and the report."""

import dataclasses
import json

import numpy as np
import pytest

from moresjax.cli import main
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
from moresjax.reports.control import (
    control_report,
    control_tables,
    joined_tables,
    overlay_figure,
)
from moresjax.testing.benchmark_files import write
from moresjax.testing.control_files import textvqa
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


def test_tables_have_the_papers_names(asked, measured):
    titles = [table.title for table in control_tables(asked[-1])]
    assert titles == ["Table 2", "Which editors act", "By class, all editors", "Table S11"]
    assert [row[0] for row in control_tables(asked[-1])[-1].rows] == ["is {e} there ?"]
    facts = {"data": {"phrasing": 1, "dataset": "textvqa"}}
    plan = Scenario("indeterminate", "brand")
    first = control_tables(ControlResult(dataclasses.replace(measured, scenario=plan), [], facts))[
        0
    ]
    assert (first.title, first.rows[0][0], first.rows[0][2]) == ("Table S10", "brand", "100%")


def saved(folder, measured, phrasing, **plan):
    """The results of a scenario in a folder of their own."""
    scenario = Scenario(**plan)
    measured = dataclasses.replace(measured, scenario=scenario)
    data = {"scenario": scenario.name, "target": scenario.target, "phrasing": phrasing}
    folder.mkdir()
    found = ControlResult(measured, [], {"data": data}).to_dict()
    (folder / "control.json").write_text(json.dumps(found))
    return str(folder)


def test_results_of_several_targets_are_one_table(measured, tmp_path, capsys):
    made = [
        saved(tmp_path / "a", measured, 1, name="misclassification", target="cat"),
        saved(tmp_path / "b", measured, 1, name="misalignment", target="cat", into="dog"),
        saved(tmp_path / "c", measured, 1, name="misclassification", target="ship"),
        saved(tmp_path / "d", measured, 2, name="misclassification", target="cat"),
        saved(tmp_path / "e", measured, 1, name="indeterminate", target="name"),
    ]
    two, nine, ten = joined_tables(made)
    assert [two.title, nine.title, ten.title] == ["Table 2", "Table S9", "Table S10"]
    own = measured.rates(ALL)
    cat, ship = two.rows
    known = [str(own[what]) for what in ("control", f"error {OTHER}", f"error {NEGATIVE}")]
    assert cat[:6] == ["cat", "50.0% [0.0, 100.0]", "18.8%", *known]
    assert cat[6] == "0.0% [0.0, 0.0]"  # nobody says yes
    assert (ship[0], ship[2], ship[6:]) == ("ship", "21.8%", ["-"] * 3)
    assert all(len(row) == len(t.head) for t in (two, ten, nine) for row in t.rows)
    command = ["analyze", "control", "--out", str(tmp_path / "out"), "--join"]
    assert main([*command, *made]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text() == said
    assert "### Table S9" in said
    for arguments, message in (
        ([made[0], made[0]], "a: another folder has misclassification of cat, too (Table 2)"),
        ([str(tmp_path)], "control.json does not exist; give an --out of analyze control"),
        ([made[0], "--model", "x"], "asks one --model RUN, or joins results"),
    ):
        assert main([*command[:3], str(tmp_path / "no"), "--join", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_an_attribute_is_asked_and_measured(tmp_path):
    write(tmp_path, textvqa())
    options = {"dataset": "textvqa", "scenario": "indeterminate", "target": "brand"}
    source = ControlSource(root=str(tmp_path), split="val", **options)
    result = measure_control(talking_model("control:groups=text"), source, out=tmp_path / "out")
    assert [*result.measured.answers] == [BASE, ALL]
    asked = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert [row["kind"] for row in asked] == 2 * [OTHER, TARGET, OTHER]
    assert asked[1]["question"] == "What is the brand, please?"
    controlled = result.measured.rates(ALL)
    assert (controlled["control"].n, controlled[f"error {OTHER}"].n) == (1, 2)
    assert controlled["control"].mean == 0.0  # the digits world has no such words
    said = {**result.measured.answers, ALL: ["gum plus", "Not sure.", "Not sure"]}
    found = dataclasses.replace(result.measured, answers=said).rates(ALL)
    assert found["control"].mean == 1.0
    assert found[f"error {OTHER}"].mean == pytest.approx(0.5)


def test_the_figure_shows_regions_and_answers_before_and_after(asked):
    measured = asked[-1].measured
    axes = [axis for axis in overlay_figure(measured, 2).axes if axis.patches]
    kinds = [TARGET, OTHER, OTHER, NEGATIVE, NEGATIVE]  # one scene has the target
    texts = {}
    for case, before, after in zip(
        measured.cases, measured.answers[BASE], measured.answers[ALL], strict=True
    ):
        texts.setdefault(f"{case.question.text}\n{before} → {after}", []).append(case)
    assert len(axes) == len(kinds)
    for axis, kind in zip(axes, kinds, strict=True):
        cases = [case for case in texts[axis.get_title()] if case.kind == kind]
        box = axis.patches[0].get_bbox().extents
        assert any(np.allclose(box, 32 * np.asarray(case.roi[0]) - 0.5) for case in cases)
        pale, part = axis.images
        assert (pale.get_alpha(), part.get_alpha()) == (0.45, None)
        left, right, bottom, top = part.get_extent()
        np.testing.assert_allclose((left, top, right, bottom), box)
        x0, y0, x1, y1 = (round(x + 0.5) for x in box)
        np.testing.assert_array_equal(part.get_array(), pale.get_array()[y0:y1, x0:x1])
    # What editors change comes first.
    changed = [axis.get_title().split("\n")[1].split(" → ") for axis in axes]
    for kind in dict.fromkeys(kinds):
        own = [a == b for (a, b), k in zip(changed, kinds, strict=True) if k == kind]
        assert own == sorted(own)


def test_a_target_that_is_never_asked_about_is_told(asked):
    model, source, *_ = asked
    with pytest.raises(UserError, match="none of the 2 questions is about the target 'three'"):
        measure_control(model, source, limit=1)
    with pytest.raises(UserError, match="tuning 'none' has no editors; tune it with --config"):
        measure_control(talking_model(), source, limit=12)
