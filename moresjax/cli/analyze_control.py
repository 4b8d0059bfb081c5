"""`moresjax analyze control`: what editors of a region and a token make a model answer."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moresjax.cli.options import (
    Commands,
    add_batch_size,
    add_command,
    add_loading,
    load_tuned_model,
    show,
)
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.data.control.rephrase import Rephraser
    from moresjax.data.control.source import ControlSource

TEXT = "template"


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "counterfactual answers by region and token, and what else the editors change"
    command = add_command(kinds, "control", run_control, help, compiles=True)
    command.add_argument(
        "--model", default="", metavar="RUN", help="a run of --config control, or its export"
    )
    command.add_argument(
        "--join",
        nargs="+",
        metavar="DIR",
        help="ask nothing: Tables 2, S9 and S10 with a row for each target, from earlier --out",
    )
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the data, such as target=cat or phrasing=2; default: those of the run",
    )
    command.add_argument("--data-root", metavar="DIR", help="folder with cifar10/ or textvqa/")
    command.add_argument("--split", metavar="SPLIT", help="default: test, or val of textvqa")
    command.add_argument(
        "--classes", default="", metavar="A,B", help="only questions about these; default: all"
    )
    command.add_argument("--limit", type=int, metavar="N", help="the first N images")
    for name, what in (
        ("negatives", "ask about classes that are not there, too (default)"),
        ("subsets", "ask with every subset of the editors (default)"),
    ):
        command.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=what
        )
    command.add_argument(
        "--rephraser",
        metavar="KIND",
        help="ask the paraphrases of Table S11, too: `template` rephrases by table, DIR with a "
        "text LLM that --config control:stage=rephraser tuned",
    )
    add_batch_size(command)
    add_loading(command)
    command.add_argument("--out", required=True, metavar="DIR", help="directory for the results")


def run_control(args: argparse.Namespace) -> None:
    """Asks, counts, and writes tables, a figure and a page; or joins tables that are there."""
    import dataclasses

    from moresjax.core.folders import new_folder, replace_file
    from moresjax.evaluation.control.run import measure_control
    from moresjax.reports.control import control_report, control_tables, joined_tables

    if bool(args.model) == bool(args.join):
        raise UserError("analyze control asks one --model RUN, or joins results: --join DIR DIR")
    if args.join:
        joined = joined_tables(args.join)
        text = "\n\n".join(table.markdown() for table in joined)
        with new_folder(args.out, "joined tables") as folder:
            replace_file(folder / "tables.md", text + "\n")
        show(args, {"tables": [dataclasses.asdict(table) for table in joined]}, text)
        return
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    source = _source(args)
    rephraser = _rephraser(args, source)
    model = load_tuned_model(args)
    result = measure_control(
        model,
        source,
        limit=args.limit,
        classes=[name.strip() for name in args.classes.split(",") if name.strip()],
        negatives=args.negatives,
        subsets=args.subsets,
        rephraser=rephraser,
        batch_size=args.batch_size,
        out=args.out,
        facts={"rephraser": args.rephraser, "limit": args.limit},
    )
    control_report(result, args.out)
    tables = [table.markdown() for table in control_tables(result)]
    show(args, result.to_dict(), "\n\n".join([*tables, f"results: {args.out}"]))


def _source(args: argparse.Namespace) -> "ControlSource":
    """The questions: those of the run's training, of another split."""
    import dataclasses

    from moresjax.data.control.attributes import NAME
    from moresjax.data.control.source import ControlSource
    from moresjax.data.sources import make_source

    options = _trained_on(Path(args.model) / "config.json")
    names = {field.name: field for field in dataclasses.fields(ControlSource)}
    for pair in args.data:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--data takes KEY=VALUE, got {pair!r}")
        kind = type(names[name].default) if name in names else str
        try:
            options[name] = kind(value)
        except ValueError:
            raise UserError(f"--data {name} takes a number, got {value!r}") from None
    options.setdefault("dataset", "cifar10")
    options["split"] = args.split or ("val" if options["dataset"] == NAME else "test")
    if args.data_root is not None:
        options["root"] = args.data_root
    source = make_source("control", **options)
    assert isinstance(source, ControlSource)
    return source


def _trained_on(path: Path) -> dict[str, Any]:
    """The options of the data of a run; none where it was trained on other data."""
    from moresjax.core.json_files import read_object

    data = read_object(path).get("data") if path.is_file() else None
    known = dict(data) if isinstance(data, dict) else {}
    return known if known.pop("name", "") == "control" else {}


def _rephraser(args: argparse.Namespace, source: "ControlSource") -> "Rephraser | None":
    """The rephraser of `--rephraser`."""
    from moresjax.evaluation.control.run import template_rephraser

    if args.rephraser is None:
        return None
    if args.rephraser == TEXT:
        return template_rephraser(source)
    if not Path(args.rephraser).is_dir():
        raise UserError(f"--rephraser is `template` or a model's folder, got {args.rephraser!r}")
    from moresjax.inference.load import load
    from moresjax.inference.rephraser import ModelRephraser

    return ModelRephraser(load(args.rephraser))
