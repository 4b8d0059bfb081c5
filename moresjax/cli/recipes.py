"""`moresjax recipes`: the papers' tables as runs."""

import argparse
import dataclasses

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "list the run behind every cell of the papers' tables"
    recipes = add_command(commands, "recipes", run, help)
    papers = "llava-steering, mrt or shift; default: all"
    recipes.add_argument("paper", nargs="?", default="", metavar="PAPER", help=papers)
    recipes.add_argument("--markdown", action="store_true", help="print the page of the docs")
    recipes.add_argument("table", nargs="?", default="", metavar="TABLE", help="such as 2 or S3")


def run(args: argparse.Namespace) -> None:
    """Prints a line per cell, or per row whose cells are of one run."""
    from moresjax.studies.recipes import markdown, select_recipes

    recipes = select_recipes(args.paper, args.table)
    if args.markdown:
        print(markdown(recipes), end="")
        return
    lines = []
    for recipe in recipes:
        place = f"{recipe.paper} {recipe.table}"
        row = " | ".join(filter(None, (recipe.row, recipe.column)))
        spec = recipe.config or (f"attach {recipe.attach}" if recipe.attach else "-")
        lines.append(f"{place:18s} {row:36s} {spec}")
        if recipe.remark:
            lines.append(f"{'':18s} {'':36s} ({recipe.remark})")
    data = {"recipes": [dataclasses.asdict(recipe) for recipe in recipes]}
    show(args, data, "\n".join(lines))
