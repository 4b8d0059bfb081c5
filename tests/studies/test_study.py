"""`moresjax study`: the papers in miniature, their pages, and what is said about them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from moresjax.cli import main
from moresjax.core.layout import TokenKind, TokenLayout
from moresjax.data.digits import FAMILIES, ask
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.evaluation.benchmarks.pope import KINDS
from moresjax.studies import llava_steering, more_tokens_and_layers, papers, tasks
from moresjax.studies.mrt import LONGEST
from moresjax.studies.papers import STUDIES
from moresjax.studies.study import agreement, run_study, with_interval
from moresjax.testing.models import digits_processor
from moresjax.tuning.selectors import parse_selector

IMAGE = np.zeros((12, 12, 3), np.uint8)

SHORT = {"lora r=8", "mores r=1"}


@dataclasses.dataclass
class CannedPipeline:
    """Scores without training: a method's accuracy, share and LMAR are a number of its own."""

    levels: dict
    scenes: int = 300
    seeds = range(5)

    def scores(self, seed, name, *, benchmark="", only=""):
        value = next(v for start, v in self.levels.items() if name.startswith(start)) + seed / 1000
        share = np.full((2, 4), (1 - value) / 3)
        share[:, 1] = value
        attention = {"share": share.tolist(), "average_visual_share": value}
        groups = {name: 100 * value for name in ("hard aAcc", "fAcc", "qAcc")}
        tasks = [*(f"digits_{f}" for f in FAMILIES), *(f"digits_pope_{kind}" for kind in KINDS)]
        score = {"score": value, "details": groups | {"yes_ratio": value}}
        return {
            "mean_accuracy": value,
            "scores": dict.fromkeys([*tasks, "digits_hallusion"], score),
            "attention": attention | {"lmar_of_means": {"text": [value, value]}},
        }

    def accuracy(self, names):
        return {
            name: [self.scores(seed, name)["mean_accuracy"] for seed in self.seeds]
            for name in names
        }

    def trainable_in_llm(self, tuning):
        return 10 * len(tuning)


LEVELS = {"full": 0.9, "lora": 0.8, "adapter": 0.6, "oft": 0.3, "ia3": 0.7}
LEVELS |= {"mores r=1": 0.55, "mores": 0.5, "connector": 0.4}
LEVELS |= {
    "tokens 25%": 0.5,
    "tokens": 0.4,
    "layers deep": 0.5,
    "layers every": 0.4,
    "layers": 0.45,
}
OF_SCORES = (*llava_steering.STUDIES, *more_tokens_and_layers.STUDIES, *tasks.STUDIES)


@pytest.mark.parametrize("name", [s.name for s in OF_SCORES if s.name != "table4"])
def test_a_study_says_what_agrees_with_the_paper(name):
    study = STUDIES[name]
    outcome = study.make(CannedPipeline(LEVELS), study)
    said = " ".join(outcome.findings)
    assert {
        "table1": "as in the paper for full, adapter, lora r=8 and ia3; against the paper "
        "for oft, mores r=2 and mores r=4",
        "fig1": "against the paper for full and lora r=8",
        "fig2": "against the paper for full, adapter, lora r=8 and ia3",
        "fig4": "as few parameters or fewer was shown to be better than full and ia3. Smaller and",
        "table2": "against mores r=1: as in the paper for adapter, lora r=8, oft and ia3.",
        "table6": "Hard Acc against mores r=4: as in the paper for oft; against the paper for full",
        "table8": "against 1%: against the paper for 25%; no difference could be shown, where the "
        "paper has one, for 50% and 100%.",
        "table9": "Mean accuracy against all: as in the paper for every:3 and every:4",
        "table10": "Mean accuracy against all: as in the paper for deep; no difference",
        "table3": "Small: accuracy against full: against the paper for adapter",
        "table7": "as in the paper for mores r=2, mores r=4 and mores r=8",
    }[name] in said
    for table in (*outcome.tables, study.paper):
        assert all(len(row) == len(table.head) for row in table.rows), table.title
    json.dumps(outcome.values)


def test_figure_2_has_an_interval_for_every_layer():
    study = STUDIES["fig2"]
    outcome = study.make(CannedPipeline(LEVELS), study)
    lines = outcome.values["lmar_by_layer"]
    assert np.mean(lines["full"], axis=0) == pytest.approx(0.902)
    wanted = [[name, *[with_interval(np.mean(own, axis=1), 2)] * 2] for name, own in lines.items()]
    assert outcome.tables[1].rows == wanted
    assert wanted[1] == ["full", "0.90 [0.90, 0.90]", "0.90 [0.90, 0.90]"]


MRT_LEVELS = {"zero-shot": 0.3, "mrt, visual 8": 0.6, "mrt, ": 0.4, "mrt": 0.5, "full": 0.9}
MRT_LEVELS |= dict.fromkeys(("lora", "aprompt", "ptum", "vpt", "reft", "m2pt", "mixlora"), 0.45)


def test_mrt_in_miniature_is_compared_with_its_own_ablations():
    methods, ablations = STUDIES["mrt-table1"], STUDIES["mrt-ablations"]
    said = methods.make(CannedPipeline(MRT_LEVELS), methods).findings[0]
    rest = "lora r=8, aprompt, ptum, vpt, reft, m2pt and mixlora"
    assert said == f"Mean accuracy against mrt: as in the paper for zero-shot, full, {rest}."
    outcome = ablations.make(CannedPipeline(MRT_LEVELS), ablations)
    assert [len(table.rows) for table in outcome.tables] == [16, 7, 5, 2, 4]
    said = " ".join(outcome.findings)
    assert "Ranks: accuracy against mrt: as in the paper for visual 4, multimodal 8; " in said
    assert "against the paper for visual 8, multimodal 8" in said
    assert "Segments: accuracy against mrt: as in the paper for prefix alone, suffix" in said
    part = dataclasses.replace(ablations, runs=[r for r in ablations.runs if "half" in r.name])
    (table,) = part.make(CannedPipeline(MRT_LEVELS), part).tables
    assert [row[0] for row in table.rows] == ["mrt", "first half", "latter half"]
    assert not part.make(CannedPipeline(MRT_LEVELS), part).figures
    # Editors train alone, and the tables share what is one run in both.
    for study in (methods, ablations):
        alone = [run.tuning for run in study.runs if run.settings]
        assert all(tuning.startswith("mrt") for tuning in alone)
    assert "reft" in {run.name for run in methods.runs} & {run.name for run in ablations.runs}
    json.dumps(outcome.values)


def shown(axis):
    return [text.get_text() for text in axis.texts]


def test_ranks_and_parts_of_mrt_are_drawn_as_far_as_they_have_run():
    study = STUDIES["mrt-ablations"]
    ranks, parts = study.make(CannedPipeline(MRT_LEVELS), study).figures.values()
    cells = ["0.602" if visual == 8 else "0.402" for visual in (2, 4, 6, 8) for _ in range(4)]
    cells[9] = "0.502"  # visual 6, multimodal 4: MRT itself
    found = {text.get_position(): text.get_text() for text in ranks.axes[0].texts}
    assert found == {(n % 4, n // 4): cell for n, cell in enumerate(cells)}
    names = [[t.get_text() for t in axis.get_yticklabels()] for axis in parts.axes]
    assert names[0][:4] == ["mrt", "without vision", "without connector", "without multimodal"]
    assert names[1] == ["mrt", "length 2"]
    wanted = ("visual 2, multimodal 2", "length 2")
    part = dataclasses.replace(study, runs=[r for r in study.runs if r.name.endswith(wanted)])
    ranks, parts = part.make(CannedPipeline(MRT_LEVELS), part).figures.values()
    assert shown(ranks.axes[0]) == ["0.402", "0.502"]
    assert [axis.get_title() for axis in parts.axes] == ["length"]


def test_longer_prefixes_than_half_a_question_are_none():
    """Why the miniature has one of the paper's lengths."""
    processor, lengths = digits_processor(), set()
    for family in FAMILIES:
        turn = ask(family, (1, 2, 1, 3), np.random.default_rng(0))
        row = processor.row(Sample(family, (Turn(f"{IMAGE_MARK}\n{turn.question}"),), (IMAGE,)))
        lengths.add(int((row.kind == TokenKind.QUESTION).sum()))
    assert (min(lengths), max(lengths)) == (5, LONGEST)
    # Whether other tokens are edited than with length 3, for questions of 5, 6 and 7 tokens.
    layout = TokenLayout.text(np.arange(LONGEST) < np.array([[5], [6], [7]]))
    masks = {}
    for length in (2, 3, 4, 10):
        selector = parse_selector(f"question:f{length}+l0|question:f0+l{length}")
        masks[length] = np.asarray(selector(layout))
    differs = {length: (mask != masks[3]).any(1).tolist() for length, mask in masks.items()}
    same = [False, False, False]
    assert differs == {2: [False, True, True], 3: same, 4: same, 10: same}


def test_the_papers_order_is_compared_only_where_it_has_one():
    here = {"a": [0.5] * 5, "b": [0.6] * 5, "c": [0.5] * 5}
    said = agreement("Score", "a", {"a": 1, "b": 1, "c": 2, "d": 3}, here)
    assert said == (
        "Score against a: no difference could be shown, where the paper has one, for c."
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The study of text-only tasks with two methods, on tiny models."""
    out = tmp_path_factory.mktemp("studies")
    study = STUDIES["table4"]
    runs = tuple(run for run in study.runs if run.name in SHORT)
    study = dataclasses.replace(study, runs=runs)
    return out, study, run_study(study, out, seeds=2, fast=True)


def test_mores_leaves_text_alone_to_the_bit(page):
    out, _, path = page
    found = json.loads((out / "table4.json").read_text())
    assert found["values"]["bit_equal"] == {"zero-shot": True, "lora r=8": False, "mores r=1": True}
    text = found["values"]["text_accuracy"]
    assert text["mores r=1"] == text["zero-shot"]
    assert len(text["zero-shot"]) == found["seeds"] == 2
    changed = {row[0]: row[1] for row in found["tables"][1]["rows"]}
    assert changed["mores r=1"].startswith("0 of ")
    html = path.read_text()
    assert not re.findall(r'(?:src|href)="http', html)
    for words in (found["command"], "HellaSwag", "no difference could be shown", "71.9"):
        assert words in html


def test_a_study_takes_over_what_another_one_trained(page):
    out, study, _ = page
    trained = sorted(out.glob("runs/*/**/train.json"))
    assert len(trained) == 2 * (3 + len(SHORT))
    before = {path: path.stat().st_mtime_ns for path in trained}
    run_study(dataclasses.replace(study, name="again"), out, seeds=2, fast=True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/**/train.json")} == before


def test_studies_are_listed_with_their_budgets(capsys):
    assert main(["study", "list"]) == 0
    text = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert re.search(rf"^{name} +\d+ min  {study.title}$", text, re.M)
    assert main(["study", "list", "--json"]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["studies"]] == list(STUDIES)
    assert [study.name for study in papers.select_studies("all")] == list(STUDIES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table99", "--out", "x"], "'table99'; choose from: table1"),
        (["table1"], "--out DIR"),
        (["table1", "--out", "x", "--seeds", "1"], "at least 2, got 1"),
        (["table1", "--out", "x", "--only", "full"], "has no part of them"),
        (["mrt-ablations", "--out", "x", "--only", "rank"], "run of study mrt-ablations 'rank'"),
    ],
)
def test_studies_that_cannot_be_are_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
