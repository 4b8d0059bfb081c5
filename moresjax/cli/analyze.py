"""`moresjax analyze`: looks inside a model."""

import argparse
from pathlib import Path

from moresjax.cli.options import Commands, add_command, add_mesh, mesh_of, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand with its kinds."""
    analyze = commands.add_parser("analyze", help="look inside a model")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")
    help = "how much attention goes to the image, and LMAR"
    attention = add_command(kinds, "attention", run_attention, help, compiles=True)
    attention.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="a model, and its name in the plots; may be repeated",
    )
    attention.add_argument(
        "--tasks", default="digits", metavar="A,B", help="benchmarks (default: %(default)s)"
    )
    attention.add_argument("--data-root", metavar="DIR", help="folder with the benchmarks' files")
    attention.add_argument(
        "--limit", type=int, default=100, metavar="N", help="items per task (default: %(default)s)"
    )
    attention.add_argument("--split", help="default: each benchmark's own")
    attention.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="ROWS",
        help="prompts answered at a time (default: %(default)s)",
    )
    add_mesh(attention)
    attention.add_argument("--out", required=True, metavar="DIR", help="directory for the plots")


def run_attention(args: argparse.Namespace) -> None:
    """Measures attention and draws it."""
    from moresjax.reports.attention import attention_report

    summaries = attention_report(
        [tuple(m.split("=", 1)) if "=" in m else (Path(m).name, m) for m in args.model],
        args.tasks.split(","),
        args.out,
        data_root=args.data_root,
        limit=args.limit,
        split=args.split,
        batch_size=args.batch_size,
        mesh=mesh_of(args),
    )
    lines = [
        f"{name:20s} average visual attention {s['average_visual_share']:.3f}  LMAR "
        + " ".join(f"{x:.2f}" for x in s["lmar_of_means"]["text"])
        for name, s in summaries.items()
    ]
    show(args, summaries, "\n".join([*lines, f"plots: {args.out}"]))
