"""`moresjax analyze overhead`: what tuning adds to the time of generation."""

import argparse
import dataclasses

from moresjax.cli.options import (
    Commands,
    add_command,
    add_loading,
    add_marks,
    load_tuned_model,
    marks_of,
    show,
)

METHODS = (
    "mores:rank=1,positions=image:1%",
    "mores:rank=4,positions=image",
    "ia3",
    "lora:rank=8",
    "adapter:bottleneck=256",
    "oft:block_size=32",
)


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "seconds that tuning methods add to a sample of generation, on this machine"
    overhead = add_command(kinds, "overhead", run, help, compiles=True)
    overhead.add_argument("--model", required=True, metavar="DIR", help="the model")
    overhead.add_argument("--prompt", default="What is this?", metavar="TEXT", help="the question")
    overhead.add_argument("--image", metavar="PATH", help="its image; default: noise")
    overhead.add_argument(
        "--try",
        dest="tunings",
        action="append",
        metavar="SPEC",
        help="a tuning with random values to measure; may be repeated; default: some of the "
        "papers', and `none` always",
    )
    for option, value, text in (
        ("--rows", 2, "prompts at a time"),
        ("--new-tokens", 16, "tokens that each generates"),
        ("--rounds", 9, "times that everything is measured, in turn"),
    ):
        overhead.add_argument(
            option, type=int, default=value, metavar="N", help=f"{text} (default: {value})"
        )
    add_marks(overhead, "--prompt")
    add_loading(overhead)


def run(args: argparse.Namespace) -> None:
    """Measures and prints a line per tuning."""
    import numpy as np

    from moresjax.inference.overhead import measure_overhead

    model = load_tuned_model(args)
    images = ()
    if args.image:
        images = (args.image,)
    elif model.config.vision is not None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
        images = (noise.astype(np.uint8),)
    rows = [model.prompts.asked(args.prompt, images, marks=marks_of(args.mark))] * max(args.rows, 0)
    tunings = args.tunings or METHODS
    found = measure_overhead(model, tunings, rows, args.new_tokens, rounds=args.rounds)
    data, lines = {}, ["added ms per sample, median over rounds [quartiles]"]
    for spec, own in found.items():
        low, high = own.quartiles
        data[spec] = dataclasses.asdict(own) | {"added": own.added, "quartiles": own.quartiles}
        lines.append(f"{spec:40s} {1e3 * own.added:+9.2f} [{1e3 * low:+.2f}, {1e3 * high:+.2f}]")
    plain = float(np.median(found["none"].plain))
    lines.append(f"without tuning a sample takes {1e3 * plain:.2f} ms")
    show(args, data, "\n".join(lines))
