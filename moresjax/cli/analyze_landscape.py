"""`moresjax analyze landscape`: the loss around what runs have trained, and how flat it is."""

import argparse
from pathlib import Path

from moresjax.cli.options import Commands, add_command, add_mesh, mesh_of, show
from moresjax.core.errors import UserError
from moresjax.core.folders import named_folder


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "the loss on random planes around what runs have trained, and how flat it is"
    landscape = add_command(kinds, "landscape", run, help, compiles=True)
    landscape.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]RUN",
        help="a run's directory, and its name in the figures; may be repeated",
    )
    for name, default, kind, words in (
        ("points", 41, int, "points of each axis, an odd number"),
        ("range", 1.0, float, "the axes go from minus this to this"),
        ("pairs", 3, int, "pairs of random directions; fewer than 3 are no evidence"),
        ("samples", 256, int, "samples that the loss is of"),
        ("seed", 0, int, "seed of directions and samples"),
        ("batch-size", 32, int, "samples of a batch"),
    ):
        landscape.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{words} (default: {default})",
        )
    landscape.add_argument(
        "--normalize",
        default="filter",
        metavar="HOW",
        help="lengths of directions: those of the parameters' filters or layers, or none "
        "(default: %(default)s)",
    )
    landscape.add_argument(
        "--split",
        default="",
        metavar="SPLIT",
        help="validation or training samples of the first run (default: validation, if it has any)",
    )
    add_mesh(landscape)
    landscape.add_argument(
        "--allow-pickle", action="store_true", help="read *.bin of folders without safetensors"
    )
    landscape.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for points and figures; a killed run goes on, and later models join",
    )


def run(args: argparse.Namespace) -> None:
    """Measures the landscapes and prints how flat they are."""
    from moresjax.evaluation.landscape.run import LandscapeOptions
    from moresjax.reports.landscape import landscape_lines, landscape_report

    options = LandscapeOptions(
        points=args.points,
        span=args.range,
        pairs=args.pairs,
        samples=args.samples,
        normalize=args.normalize,
        seed=args.seed,
        split=args.split,
        batch_size=args.batch_size,
    )
    models: dict[str, str] = {}
    for value in args.model:
        name, folder = named_folder(value)
        name = name or Path(folder).name
        if name in models:
            raise UserError(f"two models have the name {name!r}; give NAME=DIR with other names")
        models[name] = folder
    mesh, allow = mesh_of(args), args.allow_pickle
    result = landscape_report(models, args.out, options, mesh=mesh, allow_pickle=allow)
    show(args, result, "\n".join([*landscape_lines(result), f"landscape: {args.out}"]))
