"""Runs per hour of `moresjax sweep` beside the same runs of `moresjax train`, one after the other.

    python benchmarks/sweep.py [--runs 6] [--steps 60] [--config digits:stage=llm]

Every run of `train` is a process of its own, as on a user's command line; both sides begin with an
empty folder of compiled programs of their own. Prints wall-clock and CPU time, their ratios, and
whether the parameters of every run are the same bits. CPU time is what a busy machine cannot
change; wall-clock time also shows how well the cores are used.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moresjax.runs.init_weights import trained_parameters


def run(arguments: list[str], cache: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "moresjax.cli", *arguments], env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs trained to the same parameters."""
    found, wanted = trained_parameters(one), trained_parameters(other)
    return all(np.array_equal(found[name], x) for name, x in wanted.items())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--config", default="digits:stage=llm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = ["--config", args.config, f"--config.steps={args.steps}"]
        alone = np.zeros(2)
        for seed in range(args.runs):
            own = [f"--config.seed={seed}", "--workdir", str(root / "alone" / str(seed))]
            alone += run(["train", *settings, *own], root / "cache-alone")
        together = ["--seeds", str(args.runs), "--workdir", str(root / "together")]
        sweep = np.asarray(run(["sweep", *settings, *together], root / "cache-together"))
        for name, seconds in (("one by one", alone), ("sweep", sweep)):
            wall, cpu = seconds / args.runs
            print(
                f"{name:10s} {wall:6.1f} s and {cpu:6.1f} CPU s a run, {3600 / wall:5.0f} an hour"
            )
        print("ratio: wall-clock {:.2f}, CPU {:.2f}".format(*alone / sweep))
        equal = [
            same_bits(root / "together" / f"seed={seed}", root / "alone" / str(seed))
            for seed in range(args.runs)
        ]
        print(f"{sum(equal)} of {args.runs} runs have the same bits")


if __name__ == "__main__":
    main()
