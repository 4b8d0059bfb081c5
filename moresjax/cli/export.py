"""`moresjax export`: writes a model in another tool's format."""

import argparse

from moresjax.cli.options import Commands, add_command, add_pyreft, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    export = add_command(commands, "export", run, "write a model in another tool's format")
    export.add_argument("model", metavar="MODEL", help="a workdir or a Hugging Face folder")
    export.add_argument("out", metavar="OUT", help="the new folder")
    export.add_argument(
        "--format",
        required=True,
        metavar="hf|merged|tinyllava|adapter|peft|pyreft",
        help="what to write",
    )
    export.add_argument("--adapter", metavar="DIR", help="attach this adapter folder first")
    add_pyreft(export)


def run(args: argparse.Namespace) -> None:
    """Exports and names the files."""
    from moresjax.inference.convert import export_model

    out = export_model(
        args.model,
        args.out,
        args.format,
        adapter=args.adapter,
        edits=args.edits,
        allow_pickle=args.allow_pickle,
    )
    files = sorted(path.name for path in out.iterdir())
    show(args, {"out": args.out, "files": files}, f"{args.out}: {', '.join(files)}")
