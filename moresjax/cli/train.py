"""`moresjax train`: trains what a configuration describes."""

import argparse
import contextlib

from moresjax.cli.options import Commands, add_command, add_config, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    train = add_command(
        commands, "train", run, "train what a configuration describes", compiles=True
    )
    add_config(train)
    train.add_argument(
        "--workdir", required=True, metavar="DIR", help="directory for checkpoints and metrics"
    )
    train.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto continues from the newest checkpoint; never wants an empty directory",
    )
    train.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read *.bin files of base parts, and an adapter of pyreft as init.tuning",
    )
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,PROCESSES,NUMBER",
        help="this is one of several processes; on TPU pods and Slurm nothing more is needed",
    )
    train.add_argument(
        "--join-timeout",
        type=int,
        default=20,
        metavar="SECONDS",
        help="how long --distributed waits for the others to come (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains and prints the last metrics."""
    from moresjax.runs.config import load_config
    from moresjax.sharding.peers import watched_peers
    from moresjax.sharding.processes import join_processes
    from moresjax.training.loop import train

    config = load_config(args.config, args.overrides)
    options = {"resume": args.resume, "allow_pickle": args.allow_pickle}
    with contextlib.ExitStack() as stack:
        if args.distributed:
            join_processes(args.distributed, args.join_timeout)
            stack.enter_context(watched_peers())
        result = train(config, args.workdir, **options)
    numbers = " ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    data = {"workdir": args.workdir, "step": result.step, **result.metrics}
    show(args, data, f"{args.workdir}: step {result.step} {numbers}")
