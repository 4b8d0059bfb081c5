"""An iteration of the compiled k-means beside the matrix product that it cannot do without.

    python benchmarks/concepts.py [--states 100000] [--features 4096] [--concepts 20] [--rounds 5]

The product of all states with all centres costs 2 N K D operations; an iteration also adds up the
states of each cluster, which is a second product of that size. Both are measured in turn on the
same states, which lie on the device; a ratio is the median over rounds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moresjax.analysis.lloyd import HELD_BYTES, Pieces
from moresjax.analysis.state_rows import StateRows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--concepts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    assert 4 * args.states * args.features <= HELD_BYTES, "the states are to stay on the device"
    rng = np.random.default_rng(0)
    states = rng.standard_normal((args.states, args.features), dtype=np.float32)
    centres = states[: args.concepts].astype(np.float64)
    pieces = Pieces(StateRows(states), states[:1000].mean(0))
    assert pieces._held is not None

    product = jax.jit(lambda z, u: jnp.dot(z, u.T, precision=jax.lax.Precision.HIGHEST))

    def multiply():
        u = jnp.asarray(centres, jnp.float32)
        jax.block_until_ready([product(piece, u) for piece, _, _ in pieces._held])

    calls = {"product": multiply, "iteration": lambda: pieces.assign(centres)}
    times = {name: [] for name in calls}
    for number in range(args.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first round compiles
                times[name].append(time.perf_counter() - start)
    flop = 2 * args.states * args.features * args.concepts
    print(f"{args.states:,d} states of {args.features:,d}, {args.concepts} concepts")
    print("| | ms | GFLOP/s | ratio |\n|---|---:|---:|---:|")
    for name, took in times.items():
        ratio = statistics.median(t / p for t, p in zip(took, times["product"], strict=True))
        middle = statistics.median(took)
        print(f"| {name} | {1e3 * middle:.0f} | {flop / middle / 1e9:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
