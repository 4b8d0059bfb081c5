"""Peak memory of writing and of reading many states.

    python benchmarks/states_memory.py [--states 100000 1000000] [--features 4096]

Random states in float16 go into a folder in pieces of 64, as answers come; a fresh process each
writes them, reads their mean in pieces, and learns 20 concepts from them. Memory beyond that of the
program should not grow with the states: what is in memory is a shard and the index.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30
WRITE = """
import numpy as np
from moresjax.analysis.states import StatesWriter
rng = np.random.default_rng(0)
noise = rng.standard_normal(({features} + 4096)).astype(np.float32)
starts = rng.integers(0, 4096, {states})
key = ("llm.block.out", 31)
with StatesWriter({folder!r}, [key], {features}, {{}}, dtype="float16") as writer:
    for first in range(0, {states}, 64):
        writer.extend(
            [
                (dict(id=str(n), found=True), {{key: noise[s : s + {features}].copy()}})
                for n, s in enumerate(starts[first : first + 64].tolist(), first)
            ]
        )
"""
READ = """
from moresjax.analysis.states import States
states = States({folder!r})
pieces = states.chunks("llm.block.out", 31, rows=4096)
total = sum(piece.sum(0, dtype="float64") for piece in pieces)
"""
LEARN = """
from moresjax.analysis.concepts import learn
from moresjax.analysis.states import States
learn(States({folder!r}), "kmeans", 20, seed=0)
"""
NOTHING = "from moresjax.analysis import concepts, states"
STEPS = {"imports": NOTHING, "write": WRITE, "read": READ, "kmeans": LEARN}
# Pages of mapped files belong to the system; anonymous ones are the process's own.
REPORT = """
import re, resource
status = open("/proc/self/status").read()
kept = int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, kept * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    args = parser.parse_args()
    print("| states | | GiB of files | peak, GiB | anonymous at the end, GiB | s |")
    print("|---:|---|---:|---:|---:|---:|")
    for count in args.states:
        folder = tempfile.mkdtemp()
        try:
            for step in args.steps:
                values = {"folder": folder + "/states", "states": count, "features": args.features}
                code = STEPS[step].format(**values) + REPORT
                start = time.monotonic()
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                seconds = time.monotonic() - start
                peak, kept = (int(text) / GIB for text in done.stdout.split()[-2:])
                size = sum(path.stat().st_size for path in Path(folder).rglob("*.npy")) / GIB
                cells = f"{size:.2f} | {peak:.2f} | {kept:.2f} | {seconds:.0f}"
                print(f"| {count:,d} | {step} | {cells} |", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
