"""What tuning methods add to the programs of generation at MRT's own size, as libtpu compiles them.

    JAX_PLATFORMS=cpu python benchmarks/tuning_programs.py [--methods none lora ...]

Prefill and one decode step of LLaVA v1 7B (`configs/mrt.py`) for one prompt of 512 tokens with an
image, on a chip that need not be there. The engine's layers are unrolled, so 32 of them compile
for very long: operations and bytes of the compiler are extrapolated linearly in the number of
layers from the first two of `--depths` to 32, and the others say how far off a line is.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from moresjax.core.layout import RowStructure
from moresjax.plans.generation_plan import abstract_engine
from moresjax.plans.program import Program
from moresjax.plans.train_plan import abstract_batch, find_mesh
from moresjax.runs.config import load_config
from moresjax.runs.run_config import RunConfig, resolve
from moresjax.sharding.mesh import use_mesh

# Of Tables S7 and S8, as `moresjax recipes mrt` has them; prompts beside them.
METHODS = ("none", "lora", "mrt-paper", "vpt:length=10", "mixlora:factors=16")
METHODS += ("m2pt:visual_length=10,length=20", "prompt:length=10")
LAYERS, PROMPT, NEW = 32, 512, 16
COSTS = ("flops", "bytes accessed")


def costs(config: RunConfig, topology: str) -> np.ndarray:
    """Operations and bytes of prefill and decode step, `[2, 2]`."""
    _, mesh = find_mesh(config, topology)
    engine = abstract_engine(config, mesh)
    batch = abstract_batch(config, mesh, PROMPT, RowStructure.SINGLE)
    whole, bare = engine.parameters
    with use_mesh(mesh):
        prefill = Program(engine.lower_prefill(batch, NEW), (whole, batch), True)
        state = prefill.results
        decode = Program(engine.lower_steps(state), (bare, state), True)
    found = []
    for program in (prefill, decode):
        assert program.compiled is not None
        counted = program.compiled.cost_analysis() or {}
        found.append([counted[name] for name in COSTS])
    return np.asarray(found)


def line(depths: Sequence[int], values: Sequence[np.ndarray], layers: int) -> np.ndarray:
    """The values of so many layers, on the line through the first two depths."""
    (a, b), (x, y) = depths[:2], values[:2]
    return x + (y - x) * (layers - a) / (b - a)


def main() -> None:
    """Compiles, extrapolates and prints a row per method."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first is the baseline")
    parser.add_argument("--depths", nargs="+", type=int, default=(2, 4, 6))
    parser.add_argument("--topology", default="v6e-1")
    args = parser.parse_args()
    base = None
    head = ["method", "prefill, TFLOP", "GB", "decode step, GFLOP", "GB", "added", "off the line"]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for spec in args.methods:
        found = []
        for depth in args.depths:
            config = resolve(load_config(f"mrt:tuning={spec}", [f"model.llm.num_layers={depth}"]))
            config = dataclasses.replace(config, batch_size=1)
            found.append(costs(config, args.topology))
        whole = line(args.depths, found, LAYERS)
        base = whole if base is None else base
        off = [
            np.abs(line(args.depths, found, depth) / own - 1).max()
            for depth, own in zip(args.depths[2:], found[2:], strict=True)
        ]
        (flops, read), (step_flops, step_read) = whole
        cells = [f"{flops / 1e12:.3f}", f"{read / 1e9:.2f}"]
        cells += [f"{step_flops / 1e9:.2f}", f"{step_read / 1e9:.2f}"]
        cells += [", ".join(f"{100 * x:+.1f}%" for x in (whole / base - 1).ravel())]
        cells += [", ".join(f"{100 * x:.2f}%" for x in off) or "-"]
        print(f"| `{spec}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
