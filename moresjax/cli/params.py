"""`moresjax params`: exact parameter counts."""

import argparse

from moresjax.cli.options import Commands, add_command, show
from moresjax.core.errors import UserError


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "exact parameter counts of a model with a tuning method"
    params = add_command(commands, "params", run, help)
    params.add_argument("--model", metavar="DIR", help="a workdir or a Hugging Face folder")
    params.add_argument("--llm", metavar="NAME", help="instead of --model: an LLM of the zoo")
    params.add_argument("--vision", metavar="NAME", help="a vision encoder of the zoo")
    params.add_argument(
        "--connector",
        default="",
        metavar="NAME",
        help="connector between --vision and --llm (default: a whole model's, else mlp2x_gelu)",
    )
    params.add_argument(
        "--tuning", metavar="SPEC", help="such as mores:rank=1; default: the model's own"
    )
    params.add_argument(
        "--also-train",
        default="connector",
        metavar="PATH,...",
        help="parameters that train beside the method (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Counts and prints a table."""
    from moresjax.models.count import count_parameters

    tuning, also = args.tuning, tuple(filter(None, args.also_train.split(",")))
    if bool(args.model) == bool(args.llm):
        raise UserError("params needs either --model DIR or --llm NAME")
    if args.model:
        from moresjax.runs.workdir import saved_config

        config, saved_tuning = saved_config(args.model)
        tuning = tuning or saved_tuning
    else:
        from moresjax.models.zoo import mllm_config

        config = mllm_config(args.llm, args.vision, args.connector)
    tuning = tuning or "none"
    also = also if config.vision else tuple(p for p in also if p != "connector")
    report = count_parameters(config, tuning, also)
    rows = [(part, count.total, count.trainable) for part, count in report.components.items()]
    rows.append(("all", report.total, report.trainable))
    lines = [f"{'component':10s} {'parameters':>16s} {'trainable':>14s}"]
    lines += [f"{part:10s} {total:16,d} {trainable:14,d}" for part, total, trainable in rows]
    lines.append(f"trainable in the LLM (TP): {report.trainable_in_llm:,d}")
    lines.append(f"trainable share: {report.trainable / report.total:.4%}")
    lines.append(f"checkpoint of what trains: {report.checkpoint_bytes / 2**20:.1f} MiB")
    show(args, {"tuning": tuning, **report.to_dict()}, "\n".join(lines))
