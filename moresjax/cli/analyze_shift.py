"""`moresjax analyze shift`: how tuning moves concepts, and what shifts of the original recover."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moresjax.cli.analyze_concepts import add_dictionary, add_words, reading_model, word_filter
from moresjax.cli.options import Commands, add_command, numbers, show
from moresjax.core.errors import UserError
from moresjax.core.folders import named_folder

if TYPE_CHECKING:
    from moresjax.analysis.states import States


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "how tuning moves concepts, with what a global shift and shuffled samples would give"
    shift = add_command(kinds, "shift", run, help, compiles=True)
    shift.add_argument(
        "--base", required=True, metavar="DIR", help="the original model's states (analyze states)"
    )
    shift.add_argument(
        "--tuned",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="a tuned model's states for the same questions; may be repeated; names that are "
        "numbers are steps of one training",
    )
    add_dictionary(shift)
    shift.add_argument(
        "--concepts", metavar="DIR", help="the original concepts (analyze concepts); default: new"
    )
    shift.add_argument(
        "--num-concepts",
        default="20",
        metavar="K,K",
        help="concepts; more numbers are a sweep (default: %(default)s)",
    )
    shift.add_argument(
        "--layers", default="", metavar="L,L", help="the last one counts; others are a sweep"
    )
    shift.add_argument(
        "--alpha",
        default="0,.25,.5,1,1.5,2",
        metavar="A,A",
        help="strengths of the shift (default: %(default)s)",
    )
    shift.add_argument(
        "--mean",
        default="mean",
        metavar="HOW",
        help="mean, median, trimmed, difference-of-medians or difference-of-trimmed "
        "(default: %(default)s)",
    )
    shift.add_argument(
        "--assign",
        default="activation",
        metavar="HOW",
        help="samples go to a concept by activation, cosine or l2 (default: %(default)s)",
    )
    shift.add_argument(
        "--samples", type=int, default=50, metavar="N", help="most activating (default: 50)"
    )
    shift.add_argument(
        "--keywords",
        metavar="LIST",
        help="words of the task: colors, places, sentiments, positive, negative or a file",
    )
    add_words(shift, words=15, candidates=200)
    shift.add_argument("--out", required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> None:
    """Measures the shifts and prints recovery beside its controls."""
    from moresjax.analysis.concepts import Concepts
    from moresjax.analysis.shift_study import ShiftOptions
    from moresjax.analysis.states import States
    from moresjax.data.word_lists import word_list
    from moresjax.reports.concept_figures import file_pictures
    from moresjax.reports.shift import shift_lines, shift_report

    options = ShiftOptions(
        alphas=numbers("--alpha", args.alpha),
        how=args.mean,
        by=args.assign,
        words=args.words,
        candidates=args.candidates,
        norm=args.norm,
        word_filter=word_filter(args),
        samples=args.samples,
        keywords=word_list(args.keywords) if args.keywords else (),
    )
    result = shift_report(
        States(args.base),
        _named_states(args.tuned),
        args.out,
        method=args.method,
        concepts=numbers("--num-concepts", args.num_concepts, int),
        dictionary=Concepts.load(args.concepts) if args.concepts else None,
        seed=args.seed,
        site=args.site,
        layers=numbers("--layers", args.layers, int),
        options=options,
        model=reading_model(args),
        pictures=file_pictures(args.image_root),
    )
    show(args, result, "\n".join([*shift_lines(result), f"shift: {args.out}"]))


def _named_states(values: Sequence[str]) -> "dict[str, States]":
    """States by name from `NAME=DIR` or `DIR`.

    Raises:
      UserError: Two have one name, or a folder holds no states.
    """
    from moresjax.analysis.states import States

    found: dict[str, States] = {}
    for value in values:
        name, folder = named_folder(value)
        name = name or Path(folder).name
        if name in found:
            raise UserError(f"two states have the name {name!r}; give NAME=DIR with other names")
        found[name] = States(folder)
    return found
