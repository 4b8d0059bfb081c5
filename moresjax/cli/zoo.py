"""`moresjax zoo`: the named sizes."""

import argparse
import dataclasses

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    add_command(commands, "zoo", run, "list named sizes of LLMs, vision encoders, whole models")


def run(args: argparse.Namespace) -> None:
    """Prints a line per named size."""
    from moresjax.models.cards import zoo_cards

    cards = zoo_cards()
    lines = [f"{c.kind:7s} {c.name:28s} {c.parameters:>16,d}  {c.text}" for c in cards]
    show(args, {card.name: dataclasses.asdict(card) for card in cards}, "\n".join(lines))
