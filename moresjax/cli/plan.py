"""`moresjax plan`: compiles a run for a TPU slice without having one."""

import argparse
import dataclasses

from moresjax.cli.options import Commands, add_command, add_config, add_planned_workdir, show
from moresjax.core.errors import UserError


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "compile a run for a TPU slice, without one: does it fit, how fast is it"
    plan = add_command(commands, "plan", run, help)
    add_config(plan)
    add_planned_workdir(plan)
    plan.add_argument(
        "--topology", required=True, metavar="SLICE", help="chips, such as v5e:4x4 or v5e-16"
    )
    plan.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="rows per step, several with --search; default: the configuration's",
    )
    plan.add_argument("--search", action="store_true", help="try batches, meshes and remat")
    plan.add_argument(
        "--generate",
        type=int,
        metavar="NEW",
        help="instead of a train step: prefill and decode NEW tokens for each of --batch prompts",
    )
    plan.add_argument(
        "--prompt",
        type=int,
        metavar="TOKENS",
        help="prompt length for --generate; default: the configuration's max_seq_len minus NEW",
    )
    plan.add_argument(
        "--quick",
        action="store_true",
        help="compile with the least effort: several times as fast, memory a little off",
    )


def run(args: argparse.Namespace) -> None:
    """Plans a train step, a search over train steps, or generation."""
    from moresjax.plans.generation_plan import plan_generation
    from moresjax.plans.program import describe
    from moresjax.plans.train_plan import plan, search
    from moresjax.runs.config import load_config
    from moresjax.runs.sources import with_sources

    config = with_sources(load_config(args.config, args.overrides), args.workdir)
    batches = args.batch or [config.batch_size]
    if args.search and args.generate is not None:
        raise UserError("--search is for train steps, not for --generate")
    if args.prompt is not None and args.generate is None:
        raise UserError("--prompt goes with --generate")
    if args.search:
        plans = search(config, args.topology, batches=batches, quick=args.quick)
    elif len(batches) == 1:
        config = dataclasses.replace(config, batch_size=batches[0])
        if args.generate is None:
            plans = [plan(config, args.topology, args.quick)]
        else:
            sizes = args.generate, args.prompt
            plans = plan_generation(config, args.topology, *sizes, args.quick)
    else:
        raise UserError("several --batch go with --search")
    data = {"plans": [each.to_dict() for each in plans]}
    show(args, data, "\n\n".join(map(describe, plans)))
