"""The command line as a whole: which subcommands there are, and how their mistakes are told."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
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
      when interrupted, 143 when told to end before training has begun, or 141 when nobody reads the
      output any more.
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
            with _told_to_end():
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
    except KeyboardInterrupt as interrupt:
        asked = interrupt.args == (signal.SIGTERM,)
        print(f"moresjax: {'told to end (SIGTERM)' if asked else 'interrupted'}", file=sys.stderr)
        return 143 if asked else 130
    return 0


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Makes of SIGTERM an interruption, which removes what is half-written; the loop takes it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
