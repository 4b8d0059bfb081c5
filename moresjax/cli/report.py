"""`moresjax report`: one page about any set of runs."""

import argparse

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "one HTML page about runs: scores, attention, training"
    report = add_command(commands, "report", run, help)
    report.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]DIR",
        help="folders of train, evaluate or analyze attention, or a folder with such folders; the "
        "first run is what the others are compared with",
    )
    report.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the page, and prints what it finds."""
    from moresjax.reports.report import as_text, make_report, numbers, write_page
    from moresjax.reports.runs import gather

    found = make_report(gather(args.runs))
    path = write_page(found, args.out)
    show(args, numbers(found) | {"page": str(path)}, f"{as_text(found)}\nreport: {path}".strip())
