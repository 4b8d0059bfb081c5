"""The papers' tables at their own size: what is left to run, beside what the runs say."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moresjax.cli import main
from moresjax.cli.app import make_parser
from moresjax.evaluation.presets import column_values
from moresjax.reports.ablations import rank_map
from moresjax.studies.papers import STUDIES
from moresjax.studies.printed import PRINTED
from moresjax.studies.real import SIZES, TABLES, plan_tables
from moresjax.studies.recipes import select_recipes


def planned(capsys, *arguments) -> dict:
    assert main(["study", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_page_of_studies_says_which_have_a_size():
    page = Path(__file__).parents[2] / "docs" / "reference" / "studies.md"
    listed = {}
    for names, sizes in re.findall(r"^\| (`[^|]+`) \|.*\| ([^|]+) \|$", page.read_text(), re.M):
        for name in re.findall(r"`([\w-]+)`", names):
            listed[name] = tuple(re.findall(r"`(\w+)`", sizes))
    assert listed == {name: SIZES[TABLES[name][0]] if name in TABLES else () for name in STUDIES}


@pytest.mark.parametrize("key", PRINTED, ids=" ".join)
def test_what_is_printed_belongs_to_rows_and_columns_of_runs(key):
    recipes = select_recipes(*key)
    assert set(PRINTED[key]) <= {recipe.row for recipe in recipes}
    for recipe in recipes:
        printed = PRINTED[key].get(recipe.row, {})
        wanted = [recipe.column] if recipe.column else column_values(recipe.tasks.split(","), {})
        assert set(wanted) >= set(printed) or set(wanted) <= set(printed)


def test_means_are_those_of_their_columns():
    for row, scores in PRINTED["mrt", "1"].items():
        columns = [x for name, x in scores.items() if name not in ("MME", "MMAvg")]
        assert sum(columns) / 7 == pytest.approx(scores["MMAvg"], abs=0.03), row
    for table in ("1", "9", "10"):
        for row, scores in PRINTED["llava-steering", table].items():
            columns = [x for name, x in scores.items() if name != "Avg"]
            assert sum(columns) / 7 == pytest.approx(scores["Avg"], abs=0.25), (
                row
            )  # OFT is printed .2 above it


@pytest.mark.parametrize("study", TABLES)
def test_commands_are_those_of_the_command_line(study):
    assert study in STUDIES
    commands = [c for run in plan_tables(study, "7b", "runs") for c in run.commands]
    assert commands
    parser = make_parser()
    for command in dict.fromkeys(commands):
        name, *arguments = shlex.split(command)
        assert name == "moresjax"
        parser.parse_args(arguments)


def test_what_is_there_is_not_run_again(tmp_path, capsys):
    options = ["mrt-ablations", "--size", "7b", "--runs", str(tmp_path)]
    first = planned(capsys, *options)
    run = next(r for r in plan_tables("mrt-ablations", "7b", tmp_path) if r.recipe.row == "All")
    assert all(command in first["commands"] for command in run.commands)
    (run.workdir / "scores").mkdir(parents=True)
    (run.workdir / "train.json").write_text("{}")
    second = planned(capsys, *options)
    assert set(first["commands"]) - set(second["commands"]) == {run.commands[0]}
    entry = {"benchmark": "mme_sampled", "score": 1300.5, "stderr": None, "details": {}}
    (run.workdir / "scores" / "results.json").write_text(
        json.dumps({"scores": {"mme_sampled": entry}})
    )
    third = planned(capsys, *options)
    assert set(second["commands"]) - set(third["commands"]) == {run.commands[1]}
    (cell,) = [cell for cell in third["cells"] if cell["row"] == "All"]
    assert (cell["paper"], cell["ours"]) == (1233.9, 1300.5)
    assert cell["difference"] == pytest.approx(66.6)
    assert main(["study", *options]) == 0
    assert "1233.9   1300.5      +66.6" in capsys.readouterr().out


def test_figures_show_the_results_that_are_there(tmp_path, capsys):
    options = ["mrt-ablations", "--size", "7b", "--runs", str(tmp_path)]
    assert planned(capsys, *options)["figures"] == []
    scores = {"visual 4, multimodal 8": 1400.0, "visual 2, multimodal 2": 1300.0, "length 4": 1500}
    for run in plan_tables("mrt-ablations", "7b", tmp_path):
        if run.recipe.row in scores:
            (run.workdir / "scores").mkdir(parents=True)
            entry = {"score": scores[run.recipe.row], "stderr": None, "details": {}}
            found = {"mme_sampled": {"benchmark": "mme_sampled", "total": entry["score"]} | entry}
            (run.workdir / "scores" / "results.json").write_text(json.dumps({"scores": found}))
    files = [str(tmp_path / f"figure{n}.png") for n in (4, 6)]
    assert planned(capsys, *options)["figures"] == files
    assert all(Image.open(file).size[0] > 200 for file in files)
    assert main(["study", *options]) == 0
    assert f"figure: {files[0]}" in capsys.readouterr().out
    figure = rank_map({(4, 8): 1400.0, (2, 2): 1300.0}, "MME", printed={(4, 8): 1452}, form=".0f")
    assert [t.get_text() for t in figure.axes[0].texts] == ["1400\n(paper 1452)", "1300"]
    assert np.isnan(figure.axes[0].images[0].get_array().filled(np.nan)).sum() == 2


def test_sizes_and_columns():
    rows = plan_tables("table2", "13b", "runs")
    assert [run.recipe.row.split()[1] for run in rows[::4]] == ["Steering-13B"] * 5
    assert rows[0].paper == {"SciQA-IMG": 87.9}
    assert "size=13b" in rows[0].commands[0]
    # Of other tables only the smallest model is printed.
    assert plan_tables("table1", "7b", "runs")[0].paper == {}
    assert plan_tables("table1", "3b", "runs")[0].paper["Avg"] == 61.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table1", "--size", "3b"], "both --size and --runs DIR"),
        (["table1", "--runs", "x"], "both --size and --runs DIR"),
        (["shift", "--size", "7b", "--runs", "x"], "'shift'; choose from: table1"),
        (["table1", "--size", "9b", "--runs", "x"], "size of table1 '9b'; choose from: 3b, 7b"),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments, words, capsys):
    assert main(["study", *arguments]) == 2
    assert words in capsys.readouterr().err
