"""`moresjax analyze`: looks inside a model; a file for each kind of analysis."""

from moresjax.cli import (
    analyze_attention,
    analyze_attribute,
    analyze_causes,
    analyze_concepts,
    analyze_control,
    analyze_landscape,
    analyze_lens,
    analyze_overhead,
    analyze_patch,
    analyze_sensitivity,
    analyze_separability,
    analyze_shift,
    analyze_states,
    analyze_steer,
)
from moresjax.cli.options import Commands

# In the order of `moresjax analyze --help`; each has `register`, which adds its command.
KINDS = (
    analyze_attention,
    analyze_states,
    analyze_concepts,
    analyze_shift,
    analyze_steer,
    analyze_separability,
    analyze_sensitivity,
    analyze_control,
    analyze_landscape,
    analyze_lens,
    analyze_patch,
    analyze_attribute,
    analyze_causes,
    analyze_overhead,
)


def add_parser(commands: Commands) -> None:
    """Adds the subcommand with its kinds."""
    analyze = commands.add_parser("analyze", help="look inside a model")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in KINDS:
        kind.register(kinds)
