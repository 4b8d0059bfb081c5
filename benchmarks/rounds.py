"""Timing variants side by side: rounds go through all of them in turn, so that a slow moment of the
machine meets every variant; what is read are ratios within a round."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

# Runs one variant and yields the name of every phase when it has ended.
Run = Callable[[], Iterator[str]]
# Seconds of every round, by variant and phase.
Seconds = dict[str, dict[str, list[float]]]


def measure(runs: Mapping[str, Run], rounds: int) -> Seconds:
    """Runs every variant twice to compile and warm up, then `rounds` times in turn."""
    seconds: Seconds = {name: {} for name in runs}
    for number in range(-2, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for phase in run():
                end = time.perf_counter()
                if number >= 0:
                    seconds[name].setdefault(phase, []).append(end - start)
                start = end
    return seconds


def median_ratio(seconds: Seconds, name: str, phase: str) -> float:
    """The median over rounds of a phase's time relative to the first variant's in that round."""
    base = next(iter(seconds.values()))[phase]
    return statistics.median(x / y for x, y in zip(seconds[name][phase], base, strict=True))
