"""`moresjax study`: the papers' tables and figures in miniature."""

import argparse
from typing import Any

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "the papers' tables and figures in miniature, with intervals over whole-pipeline seeds"
    study = add_command(commands, "study", run, help, compiles=True)
    study.add_argument("name", metavar="NAME", help="a study; `list` shows them, `all` runs them")
    study.add_argument("--out", metavar="DIR", help="directory that all studies share")
    study.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="seeds of the whole pipeline (default: 5)"
    )
    study.add_argument(
        "--only",
        default="",
        metavar="RUN;RUN",
        help="make a part of the runs, where the study compares one with others (mrt-ablations)",
    )
    study.add_argument(
        "--size",
        default="",
        metavar="3b",
        help="not the miniature but the paper's table: the commands that are left, and paper, ours "
        "and difference from the results that are there (figures, where the table is one)",
    )
    study.add_argument("--runs", default="", metavar="DIR", help="with --size: all runs")
    study.add_argument(
        "--data-root",
        default="data/benchmarks",
        metavar="DIR",
        help="with --size: the benchmarks' files, for the commands (default: %(default)s)",
    )
    study.add_argument("--fast", action="store_true", help="a few steps per stage, for tests")


def run(args: argparse.Namespace) -> None:
    """Lists studies, or runs them and names their pages."""
    import json
    from pathlib import Path

    from moresjax.core.errors import UserError
    from moresjax.studies.papers import STUDIES, list_studies, select_studies
    from moresjax.studies.real import (
        check_size,
        describe_plan,
        draw_plan,
        plan_tables,
        plan_text,
    )
    from moresjax.studies.study import run_study

    if args.name == "list":
        data = [
            {"name": s.name, "title": s.title, "minutes_per_seed": s.minutes, "runs": len(s.runs)}
            for s in STUDIES.values()
        ]
        show(args, {"studies": data}, list_studies(args.seeds))
        return
    check_size(args.size, args.runs)
    if args.size:
        plan = plan_tables(args.name, args.size, args.runs, args.data_root)
        figures = [str(path) for path in draw_plan(plan, args.runs)]
        data = describe_plan(plan) | {"figures": figures}
        show(args, data, plan_text(data))
        return
    studies = select_studies(args.name)
    if not args.out:
        raise UserError("a study needs --out DIR, the directory that all studies share")
    only = [name.strip() for name in args.only.split(";") if name.strip()]
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    for study in studies:
        page = run_study(study, args.out, seeds=args.seeds, fast=args.fast, only=only)
        found.append(json.loads((Path(args.out) / f"{study.name}.json").read_text()))
        lines += [study.title, *found[-1]["findings"], f"page: {page}"]
    show(args, {"studies": found}, "\n".join(lines))
