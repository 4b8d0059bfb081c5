"""The command line as a whole: which subcommands there are, and how their mistakes are told."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moresjax._version import __version__
from moresjax.cli import (
    analyze,
    compare,
    data,
    demo,
    evaluate,
    export,
    generate,
    import_,
    params,
    plan,
    recipes,
    report,
    serve,
    study,
    sweep,
    train,
    zoo,
)
from moresjax.core.errors import UserError
from moresjax.core.folders import disk_error
from moresjax.core.plugins import use_plugins
from moresjax.hardware.host import use_huge_pages

# In the order of `moresjax --help`.
COMMANDS = (
    demo,
    train,
    sweep,
    evaluate,
    compare,
    generate,
    serve,
    analyze,
    report,
    import_,
    export,
    plan,
    data,
    recipes,
    study,
    zoo,
    params,
)
OVERRIDE = "--config."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="moresjax",
        description="Train, evaluate and explain multimodal LLMs by editing representations.",
    )
    parser.add_argument("--version", action="version", version=f"moresjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      arguments: The words after `moresjax`; by default those of this process.

    Returns:
      The exit code: 0, 2 for a user's mistake, which is printed as one sentence, 130
      when interrupted, or 141 when nobody reads the output any more.
    """
    if arguments is None:
        use_huge_pages()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Orbax logs with a traceback what it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Libraries read it when they are imported, which no command does before this.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()  # so that a closed pipe is noticed here and not at exit
    except BrokenPipeError:
        # The reader has seen enough, as in `moresjax zoo | head`: the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for a process that SIGPIPE has ended
    except UserError as error:
        print(f"moresjax: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not (sentence := disk_error(error)):
            raise
        print(f"moresjax: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moresjax: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(arguments: Sequence[str] | None) -> None:
    args = _parse(arguments)
    use_plugins(args.plugin)
    if args.compiles:
        from moresjax.sharding.processes import use_compile_cache

        use_compile_cache()
    args.run(args)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with every `--config.key=value` collected in `overrides`."""
    if any("\0" in word for word in arguments or ()):
        raise UserError("a word of the command has a zero byte, which no text and no path may have")
    args, rest = make_parser().parse_known_args(arguments)
    args.overrides = [item.removeprefix(OVERRIDE) for item in rest if item.startswith(OVERRIDE)]
    unknown = [item for item in rest if not item.startswith(OVERRIDE)]
    if unknown or (args.overrides and "config" not in args):
        raise UserError(f"unknown argument {(unknown or rest)[0]!r}")
    return args
