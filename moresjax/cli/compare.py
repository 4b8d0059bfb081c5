"""`moresjax compare`: evaluations of several models, question by question."""

import argparse
import dataclasses

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "compare evaluations of several models on the same questions"
    compare = add_command(commands, "compare", run, help)
    compare.add_argument(
        "folders", nargs="+", metavar="DIR", help="the --out of an evaluation; two or more"
    )
    compare.add_argument(
        "--resamples",
        type=int,
        default=10_000,
        metavar="N",
        help="draws of images behind an interval (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Prints every pair's difference with its interval and test."""
    from moresjax.core.errors import UserError
    from moresjax.evaluation.compare import compare, compare_table
    from moresjax.evaluation.paired import OF_ONE_SEED

    if args.resamples < 100:
        raise UserError(f"--resamples must be at least 100, got {args.resamples}")
    found = compare(args.folders, resamples=args.resamples)
    data = [dataclasses.asdict(one) | {"finding": one.finding} for one in found]
    show(args, {"comparisons": data, "note": OF_ONE_SEED}, compare_table(found))
