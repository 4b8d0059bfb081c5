"""`moresjax demo`: the whole story on built-in data."""

import argparse
import shlex
from pathlib import Path

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "the paper's three stages on built-in real data, with a report"
    demo = add_command(commands, "demo", run, help, compiles=True)
    demo.add_argument(
        "--out", default="runs/demo", help="directory for the report (default: %(default)s)"
    )
    demo.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="how often the whole pipeline is repeated"
    )
    demo.add_argument("--fast", action="store_true", help="a few steps per stage, for tests")


def run(args: argparse.Namespace) -> None:
    """Runs the demo and names its report."""
    from moresjax.studies.demo import run_demo

    results = run_demo(args.out, seeds=args.seeds, fast=args.fast)
    out = Path(args.out)
    lines = [
        *results["findings"],
        f"report: {out / 'report.html'}, {out / 'states.html'}",
        f"talk to its models: moresjax serve {shlex.quote(str(out))}",
    ]
    show(args, results, "\n".join(lines))
