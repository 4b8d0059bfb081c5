"""`moresjax analyze separability`: how far classes of states lie apart, layer by layer."""

import argparse
from pathlib import Path

from moresjax.cli.options import Commands, add_command, show
from moresjax.core.errors import UserError


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "linear probes and principal planes of states, layer by layer"
    command = add_command(kinds, "separability", run_separability, help)
    command.add_argument("--states", required=True, metavar="DIR", help="a store of states")
    command.add_argument(
        "--by",
        required=True,
        metavar="FIELD",
        help="the class of a state: a field of its row in the index (prediction) or of its "
        "metadata (answer_type)",
    )
    command.add_argument(
        "--classes", metavar="A,B", help="only states of these classes; default: all"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="seed for the split into training and test states"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="a new directory")


def run_separability(args: argparse.Namespace) -> None:
    """Fits probes, writes `separability.json` and draws accuracies and planes."""
    from moresjax._version import __version__
    from moresjax.analysis.separability import labelled, separability
    from moresjax.analysis.states import States
    from moresjax.analysis.vectors import data_hash
    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.reports.steering import plane_figure, probe_figure

    check_new(Path(args.out), "analysis")
    states = States(args.states)
    found, labels = labelled(states, args.by)
    if args.classes:
        wanted = [name.strip().lower() for name in args.classes.split(",")]
        kept = [n for n, label in enumerate(labels) if label in wanted]
        if missing := [name for name in wanted if name not in labels]:
            raise UserError(f"no state has {args.by} {missing[0]!r}")
        found, labels = found.take(kept), [labels[n] for n in kept]
    layers = separability(found, labels, seed=args.seed)
    names = ("model", "weights", "processor")
    content = {
        "by": args.by,
        "classes": sorted({*labels}),
        "seed": args.seed,
        "n": len(labels),
        "data": data_hash(states),
        "version": __version__,
        **{name: states.meta[name] for name in names if name in states.meta},
        "layers": [layer.to_dict() for layer in layers],
        "labels": labels,
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "separability.json", content, indent=None)
        probe_figure(layers).savefig(folder / "probes.png", dpi=150)
        plane_figure(layers, labels).savefig(folder / "planes.png", dpi=150)
    lines = [
        f"{layer.site} {layer.layer}: test accuracy {layer.test:.3f} (majority "
        f"{layer.majority:.3f}, train {layer.train:.3f}, n {layer.n[1]})"
        for layer in layers
    ]
    short = content | {"layers": [x.to_dict() | {"plane": None} for x in layers], "labels": None}
    show(args, short, "\n".join([*lines, f"figures: {args.out}"]))
