"""The papers' tables at their own size: what is left to run, and what the runs that are there say.

DIR/CONFIG-STRING        a run of `recipes.py`, shared by all tables that want it
DIR/CONFIG-STRING/scores its evaluation
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import read_object
from moresjax.evaluation.presets import column_values, expand_presets
from moresjax.evaluation.results import RESULTS
from moresjax.reports.ablations import Score, part_scores, rank_map
from moresjax.reports.plots import save
from moresjax.studies.printed import PRINTED
from moresjax.studies.recipes import Recipe, select_recipes
from moresjax.training.prepare import RESULT as TRAINED

# Studies whose tables have runs, and their tables in `recipes.py`.
TABLES: Mapping[str, tuple[str, Sequence[str]]] = {
    f"table{n}": ("llava-steering", (str(n),)) for n in (1, 2, 3, 4, 6, 7, 8, 9, 10)
} | {
    "mrt-table1": ("mrt", ("1",)),
    "mrt-ablations": ("mrt", ("3", "S3", "S6", "Figure 4", "Figure 6")),
}
SIZES = {"llava-steering": ("3b", "7b", "13b"), "mrt": ("7b",)}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a table.

    Attributes:
      recipe: The cell or row.
      workdir: The directory of the run.
      commands: What is left to run, in this order; empty where everything is there.
      paper: The printed scores by column.
      ours: Those of the run's evaluation by column; None where a number is missing.
    """

    recipe: Recipe
    workdir: Path
    commands: Sequence[str]
    paper: Mapping[str, float]
    ours: Mapping[str, float | None]


def plan_tables(
    study: str, size: str, runs: str | Path, data_root: str | Path = "data/benchmarks"
) -> list[Planned]:
    """The runs of a study's tables at the papers' size, in the order of the tables.

    >>> first = plan_tables("table7", "3b", "runs")[0]
    >>> first.paper, first.ours, len(first.commands)
    ({'SciQA-IMG': 89.6}, {}, 2)

    Args:
      study: The name of a study whose tables have runs.
      size: The size of the model, such as `3b`.
      runs: The directory of all runs.
      data_root: The directory of the benchmarks' files, for the commands.

    Raises:
      UserError: The study has no such tables, or the paper no model of that size.
    """
    if study not in TABLES:
        raise choice_error("study of tables with runs", study, TABLES)
    paper, tables = TABLES[study]
    if size not in SIZES[paper]:
        raise choice_error(f"size of {study}", size, SIZES[paper])
    found = []
    for table in tables:
        for recipe in select_recipes(paper, table):
            # The only table with several sizes has them in its rows.
            if table == "2" and f"-{size.upper()} " not in recipe.row:
                continue
            sized = re.sub(r"size=\w+", f"size={size}", recipe.config)
            recipe = dataclasses.replace(recipe, config=sized)
            printed = size == SIZES[paper][0] or table == "2"
            scores = PRINTED[paper, table].get(recipe.row, {}) if printed else {}
            found.append(_planned(recipe, scores, Path(runs), data_root))
    return found


def _planned(
    recipe: Recipe, paper: Mapping[str, float], runs: Path, data_root: str | Path
) -> Planned:
    if recipe.column:
        paper = {header: x for header, x in paper.items() if header == recipe.column}
    folder = runs / re.sub(r"[^\w=.;-]+", "_", recipe.config)
    if not recipe.config:
        return Planned(recipe, folder, (), paper, {})
    scores = folder / "scores"
    commands = []
    if not (folder / TRAINED).is_file():
        commands.append(["moresjax", "train", "--config", recipe.config, "--workdir", str(folder)])
    names = recipe.tasks.split(",")
    known = read_object(scores / RESULTS)["scores"] if (scores / RESULTS).is_file() else {}
    there = {entry.get("benchmark") or name for name, entry in known.items()}
    if commands or set(expand_presets(names)) - there:
        command = ["moresjax", "evaluate", "--model", str(folder), "--tasks", recipe.tasks]
        commands.append([*command, "--data-root", str(data_root), "--out", str(scores)])
    ours = column_values(names, known) if known else {}
    if recipe.column and ours:
        ours = {recipe.column: next(iter(ours.values()))}
    return Planned(recipe, folder, tuple(map(shlex.join, commands)), paper, ours)


def describe_plan(plan: Sequence[Planned]) -> dict[str, Any]:
    """A plan as data: `cells`, with the paper's score, ours and the difference, and `commands`."""
    cells = []
    for run in plan:
        for column in dict.fromkeys((*run.paper, *run.ours)):
            paper, ours = run.paper.get(column), run.ours.get(column)
            cells.append(
                {
                    "table": run.recipe.table,
                    "row": run.recipe.row,
                    "column": column,
                    "paper": paper,
                    "ours": ours,
                    "difference": None if paper is None or ours is None else ours - paper,
                    "workdir": str(run.workdir) if run.recipe.config else "",
                    "remark": run.recipe.remark,
                }
            )
    commands = dict.fromkeys(command for run in plan for command in run.commands)
    return {"cells": cells, "commands": list(commands)}


def draw_plan(plan: Sequence[Planned], runs: str | Path) -> list[Path]:
    """Draws MRT's figures 4 and 6 from the results that are there: `figure4.png`, `figure6.png`.

    Args:
      plan: The runs of a study.
      runs: The directory of all runs, in which the figures are written.

    Returns:
      The figures that were written; none for another study, or without results.
    """
    grid: dict[tuple[int, int], float] = {}
    printed: dict[tuple[int, int], float] = {}
    panels: dict[str, dict[str, Score]] = {}
    for run in plan:
        score, row = next(iter(run.ours.values()), None), run.recipe.row
        if score is None:
            continue
        if run.recipe.table == "Figure 4":
            visual, rank = map(int, re.findall(r"\d+", row))
            grid[visual, rank] = score
            if run.paper:
                printed[visual, rank] = next(iter(run.paper.values()))
        elif run.recipe.table == "Figure 6":
            panels.setdefault(row.split()[0], {})[row] = score, None
    folder, files = Path(runs), []
    if grid:
        figure = rank_map(grid, "MME", printed=printed, form=".0f")
        save(figure, path := folder / "figure4.png")
        files.append(path)
    if panels:
        base, _ = panels.get("length", {}).get("length 4", (None, None))
        save(part_scores(panels, "MME", base), path := folder / "figure6.png")
        files.append(path)
    return files


def plan_text(data: Mapping[str, Any]) -> str:
    """A plan as text: the table, then what is left to run."""

    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.1f}"

    lines = [f"{'table':10s} {'row':28s} {'column':14s} {'paper':>8s} {'ours':>8s} difference"]
    for cell in data["cells"]:
        places = f"{cell['table']:10s} {cell['row']:28s} {cell['column']:14s}"
        numbers = f"{number(cell['paper']):>8s} {number(cell['ours']):>8s}"
        lines.append(f"{places} {numbers} {number(cell['difference'], '+'):>10s}")
    lines += [f"figure: {path}" for path in data.get("figures", ())]
    left = data["commands"]
    lines += ["", f"{len(left)} commands are left:" if left else "nothing is left to run", *left]
    return "\n".join(lines)


def check_size(size: str, runs: str) -> None:
    """Refuses one of `--size` and `--runs` without the other."""
    if bool(size) != bool(runs):
        raise UserError("the papers' own tables need both --size and --runs DIR")
