"""`moresjax sweep`: trains one configuration over a grid of settings and several seeds."""

import argparse
import logging

from moresjax.cli.options import Commands, add_command, add_config, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "train a configuration over a grid of settings and several seeds, in one process"
    sweep = add_command(commands, "sweep", run, help, compiles=True)
    add_config(sweep)
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A;B",
        help="values of a config key to try; may be repeated, for all combinations",
    )
    sweep.add_argument(
        "--seeds", type=int, metavar="N", help="runs of every combination, each with its own seed"
    )
    sweep.add_argument(
        "--workdir", required=True, metavar="DIR", help="directory with a folder for every run"
    )
    sweep.add_argument(
        "--at-once",
        type=int,
        default=0,
        metavar="N",
        help="runs that train at the same time; default: one per core of a CPU, 2 on another "
        "device, one on several devices",
    )
    sweep.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read *.bin files of base parts, and an adapter of pyreft as init.tuning",
    )


def run(args: argparse.Namespace) -> None:
    """Trains all runs and prints what they have found."""
    from moresjax.studies.sweep import parse_grid, sweep, table

    logging.getLogger("moresjax.training.many").setLevel(logging.INFO)  # the programs of the runs
    summary = sweep(
        args.config,
        args.workdir,
        grid=parse_grid(args.grid),
        seeds=args.seeds,
        overrides=args.overrides,
        at_once=args.at_once,
        allow_pickle=args.allow_pickle,
    )
    show(args, summary, table(summary))
