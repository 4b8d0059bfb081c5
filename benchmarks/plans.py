"""Plans of the papers' runs for TPU slices, as docs/plans.md: no TPU needed, minutes a row.

    JAX_PLATFORMS=cpu python benchmarks/plans.py --sizes 7b --tunings mores-base --slices v5e-8

Rows that the file has already are kept, so the table may be made in several goes. With `--quick`
the compiler makes the least effort.
"""

import argparse
import itertools
import re
from pathlib import Path

from moresjax.hardware.chips import GIB, find_slice
from moresjax.plans.program import Plan
from moresjax.plans.train_plan import plan
from moresjax.runs.config import load_config
from moresjax.sharding.mesh import PRESETS, mesh_preset

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plans.md"
HEAD = """# Plans for TPU slices

Written by `python benchmarks/plans.py`: the train step of `configs/llava_steering.py`, compiled by
libtpu for chips that need not be there. Rows of 1024 tokens with one image, remat on, trained
parameters in fp32. Memory is the compiler's peak per chip; traffic is that of all collectives per
chip and step; milliseconds and tokens/s are bounds from the datasheets (padding counts as tokens),
which a real step does not reach. `quick` rows (`moresjax plan --quick`) are compiled with the least
effort: 7b with MoReS for v6e-8 in 42 s instead of 164, to the same numbers. On v5e-8 the peaks of
three rows compiled both ways were 5.18 and 5.26, 6.94 and 6.81, 7.79 and 8.46 GiB (quick, in full),
their traffic and bounds equal.

`moresjax plan --config FILE --topology v5e-8 --batch 16 --generate 128 --prompt 1024` plans
generation instead: the engine's prefill and one step of its decode loop, layers unrolled as they
are there, which takes deep models many minutes to compile.

"""
COLUMNS = ("model", "tuning", "slice", "mesh", "quantize", "batch", "peak GiB", "of", "fits")
COLUMNS += ("traffic GiB", "bound by", "ms", "tokens/s", "compiled")


def row(size: str, tuning: str, preset: str, args, target: str) -> str:
    settings = {
        **{"max_seq_len": 1024, "images_per_row": 1, "remat": True},
        **{"batch_size": args.batch, "quantize": args.quantize},
        **{f"mesh.{k}": n for k, n in mesh_preset(preset, find_slice(target).size).items()},
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(f"llava_steering:size={size},tuning={tuning}", overrides)
    return cells(size, tuning, target, preset, plan(config, target, args.quick))


def cells(size: str, tuning: str, target: str, preset: str, found: Plan) -> str:
    traffic = sum(each["bytes"] for each in found.collectives.values()) / GIB
    known = found.memory is not None  # without a program there is no traffic, and so no bound
    values = [
        size,
        tuning,
        target,
        preset,
        found.setting["quantize"] or "-",
        found.setting["batch_size"],
        f"{found.needed_bytes / GIB:.2f}",
        f"{found.hbm_bytes / GIB:.0f}",
        "yes" if found.fits else "no",
        f"{traffic:.2f}" if known else "-",
        found.bound if known else "-",
        f"{1e3 * found.seconds[found.bound]:.0f}" if known else "-",
        f"{found.tokens_per_second:,.0f}" if known else "-",
        "quick" if found.setting["quick"] else "in full",
    ]
    return f"| {' | '.join(map(str, values))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["3b", "7b", "13b"])
    parser.add_argument("--tunings", nargs="+", default=["mores-base", "lora", "full"])
    parser.add_argument("--slices", nargs="+", default=["v5e-8", "v5p-8", "v6e-8", "v5e-64"])
    parser.add_argument("--preset", default="fsdp", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quantize", default="", choices=["", "int8"])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    known = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    rows = [line for line in known.splitlines() if re.match(r"\| \d+b ", line)]
    for size, tuning, target in itertools.product(args.sizes, args.tunings, args.slices):
        start = (size, tuning, target, args.preset, args.quantize or "-", str(args.batch))
        rows = [line for line in rows if tuple(line.strip("| ").split(" | ")[:6]) != start]
        rows.append(row(size, tuning, args.preset, args, target))
        head = [
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        DOCUMENT.write_text(HEAD + "\n".join([*head, *rows]) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
