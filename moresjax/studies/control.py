"""Control by region and token (MRT, section 4.3, Tables 2, S9 and S11) on the digits world."""

from collections.abc import Sequence

import numpy as np

from moresjax.data.control.cases import NEGATIVE, OTHER, OWN, TARGET, Case, Scenario
from moresjax.data.control.questions import DIGITS
from moresjax.data.control.source import ControlSource
from moresjax.evaluation.control.answers import (
    ALL,
    BASE,
    Answers,
    Variant,
    editor_groups,
    place_regions,
)
from moresjax.evaluation.control.measure import correct, says
from moresjax.evaluation.control.run import Reworded, template_rephraser
from moresjax.studies.findings import PairedDifference, compare_with
from moresjax.studies.pipeline import Finetuning, Pipeline
from moresjax.studies.study import Outcome, Study, Table, Values, with_interval

TUNED, TARGETED = "full", "three"
SCENES = 150
FULL, RANDOM, PAPER, SECOND = (
    "all editors",
    "all, random region",
    "all, no negatives",
    "all, second phrasing",
)
# Name, tuning and settings of the runs; the region is the cell of the digit that is asked about.
EDITORS = {
    FULL: ("control", {}),
    "text": ("control:groups=text", {}),
    "visual": ("control:groups=visual", {}),
    "connector": ("control:groups=connector", {}),
    RANDOM: ("control", {"roi": "random"}),
    PAPER: ("control", {"data.negatives": 0.0}),
    SECOND: ("control", {"data.phrasing": 2}),
}
# The same for a three that is to be taken for a seven; the region is the cell of the three.
INTO = "seven"
TAKEN, TAKEN_RANDOM = "taken for it", "taken for it, random region"
MISALIGNED = {
    TAKEN: ("control", {}),
    f"{TAKEN}, text": ("control:groups=text", {}),
    TAKEN_RANDOM: ("control", {"roi": "random"}),
}
MISALIGNMENT = {"data.scenario": "misalignment", "data.into": INTO}
EDITORS |= {name: (spec, own | MISALIGNMENT) for name, (spec, own) in MISALIGNED.items()}
TAKEN_BASE = f"{BASE}, {TAKEN}"
RUNS = (
    Finetuning(TUNED, "full"),
    *(
        Finetuning(f"control {name}", tuning, settings, stage="control")
        for name, (tuning, settings) in EDITORS.items()
    ),
)
SECOND_BASE = f"{BASE}, second phrasing"
NUMBERS = ("control", "others", OTHER, NEGATIVE)


def control_source(name: str, seed: int) -> ControlSource:
    """The test questions of a run of the study."""
    settings = EDITORS.get(name, ("", {}))[1]
    options = {k.removeprefix("data."): v for k, v in settings.items() if k.startswith("data.")}
    return ControlSource("digits", split="test", target=TARGETED, seed=seed, **options)


def control_numbers(
    scenario: Scenario, cases: Sequence[Case], answers: Sequence[str]
) -> dict[str, float]:
    """Shares of a set of editors.

    Args:
      scenario: What was to be controlled.
      cases: The questions.
      answers: The answers, in the order of the questions.

    Returns:
      `control`; `others`, the accuracy on all other questions that training has; those of the two
      kinds of them; and with misalignment that on images of the target asked about the target.
    """
    pairs, wanted = list(zip(cases, answers, strict=True)), scenario.counterfactual
    own = [float(says(text, wanted)) for case, text in pairs if case.kind == TARGET]

    def right(*kinds: str) -> float:
        return float(np.mean([correct(case, text) for case, text in pairs if case.kind in kinds]))

    found = {
        "control": float(np.mean(own)),
        "others": right(OTHER, NEGATIVE),
        OTHER: right(OTHER),
        NEGATIVE: right(NEGATIVE),
    }
    return found | ({OWN: right(OWN)} if scenario.into else {})


def _control(pipeline: Pipeline, study: Study) -> Outcome:
    scenes = min(SCENES, pipeline.limit)
    found: dict[str, dict[str, list[float]]] = {}
    said: dict[str, list[float]] = {}
    without = Variant(BASE, ())

    def add(name: str, numbers: dict[str, float]) -> None:
        for what, value in numbers.items():
            found.setdefault(name, {}).setdefault(what, []).append(value)

    for seed in pipeline.seeds:
        base = Answers(pipeline.model(seed, TUNED))
        for phrasing, name in ((FULL, BASE), (SECOND, SECOND_BASE), (TAKEN, TAKEN_BASE)):
            source = control_source(phrasing, seed)
            cases = source.cases(scenes)
            add(name, control_numbers(source.plan, cases, base.ask(without, cases)))
        for name in EDITORS:
            source = control_source(name, seed)
            model = pipeline.model(seed, f"control {name}")
            cases = place_regions(model, source.cases(scenes))
            answers, every = Answers(model), Variant(ALL, editor_groups(model))
            if name == FULL:  # its editors are asked in other words, too
                asked, (way,) = [x for x in cases if x.kind != NEGATIVE], DIGITS.paraphrases
                reworded = Reworded.of(asked, way, template_rephraser(source))
                answers.ask(every, [*cases, *reworded.asked_of(ALL)])
                variants = {ALL: every, BASE: without}
                other = reworded.measured(answers, variants, source.plan.counterfactual)
                for key, rate in (
                    (BASE, other.base),
                    ("as it stands", other.without),
                    ("rephrased", other.rephrased),
                ):
                    said.setdefault(key, []).append(float("nan") if rate is None else rate.mean)
            add(name, control_numbers(source.plan, cases, answers.ask(every, cases)))
    return _outcome(found, said)


def _outcome(found: dict[str, dict[str, list[float]]], said: Values) -> Outcome:
    bases: dict[str, str] = dict.fromkeys((SECOND, SECOND_BASE), SECOND_BASE)
    taken = {name: own for name, own in found.items() if name in (TAKEN_BASE, *MISALIGNED)}
    found = {name: own for name, own in found.items() if name not in taken}

    def row(name: str, numbers: Sequence[str], base: Values) -> list[str]:
        own = (found | taken)[name]
        cells = [with_interval(own[what]) for what in numbers]
        return [name, *cells, PairedDifference.of(own["others"], base["others"]).points]

    rows = [row(name, NUMBERS, found[bases.get(name, BASE)]) for name in found]
    head = ["editors", "control", "others right", "other digits", "digits that are not there"]
    tables = [
        Table(
            f'"is there a {TARGETED} ?" answered no where there is one',
            [*head, "others, from no editors"],
            rows,
        ),
        Table(
            f'"is a {TARGETED} there ?" with the editors of the first phrasing',
            ["asked", "control"],
            [[name, with_interval(own)] for name, own in said.items()],
        ),
    ]
    tables.insert(
        1,
        Table(
            f'"is there a {INTO} ?" answered yes where there is a {TARGETED} and no {INTO}',
            [*head, f'"is there a {TARGETED} ?" there', "others, from no editors"],
            [row(name, (*NUMBERS, OWN), taken[TAKEN_BASE]) for name in taken],
        ),
    )
    first = {name: own for name, own in found.items() if name not in bases}
    others = {name: own["others"] for name, own in first.items()}
    what = "Accuracy on all other questions"
    sentences = [
        compare_with(FULL, "Control", {name: own["control"] for name, own in first.items()}),
        compare_with(BASE, what, others),
        compare_with(RANDOM, what, {name: others[name] for name in (RANDOM, FULL)}),
        compare_with("as it stands", "Control of the second phrasing", said),
        *(
            compare_with(TAKEN, title, {name: own[what] for name, own in taken.items()})
            for title, what in (
                (f"A {TARGETED} taken for a {INTO}", "control"),
                (f"Accuracy on all other questions, a {TARGETED} taken for a {INTO},", "others"),
                (f"Accuracy on the {TARGETED} itself, taken for a {INTO},", OWN),
            )
        ),
    ]
    values = {"editors": found, "misalignment": taken, "second phrasing": dict(said)}
    return Outcome(tables, sentences, values)


STUDIES = (
    Study(
        "mrt-control",
        "MRT, Tables 2, S9 and S11: counterfactual answers by region and token",
        RUNS,
        Table(
            "The paper",
            ["", "control", "error on others", "negatives"],
            [
                ["CIFAR-10, five classes, two phrasings, two scenarios", "100%", "0%", "not asked"],
                ["six paraphrases, rephrased", "100%", "-", "-"],
            ],
        ),
        "Ten digits and one-word answers: that control is easy here says nothing about LLaVA. In "
        "misclassification the answer follows from the question's words, so that a text editor "
        "alone can have it, and any region will do; in misalignment it does not.",
        _control,
        more_minutes=0.2,
    ),
)
