"""Timing variants side by side: rounds go through all of them in turn, so that a slow moment of the
machine meets every variant; what is read are ratios within a round."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Runs one variant and yields the name of every phase when it has ended; may return a value.
Run = Callable[[], Iterator[str]]
# Seconds of every round, by variant and phase.
Seconds = dict[str, dict[str, list[float]]]


class Worker:
    """A variant in a process of its own, which is a `Run` as well.

    Libraries then meet neither each other's threads nor each other's settings of the C library:
    `huge_pages` is what the `moresjax` command starts with, and other programs do not.

    Args:
      make: gives the run when called in the process; a function of a module.
      *arguments: of `make`.
      huge_pages: whether the C library asks for them.

    Attributes:
      value: what the last run returned.
      peak: GiB of memory that the process has held at most.
    """

    def __init__(self, make: Callable[..., Run], *arguments: Any, huge_pages: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.value, self.peak = None, 0.0
        # Inherited by the process, whose C library reads it once, at its start.
        os.environ["GLIBC_TUNABLES"] = f"glibc.malloc.hugetlb={int(huge_pages)}"
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def __call__(self) -> Iterator[str]:
        self._pipe.send("run")
        while isinstance(message := self._pipe.recv(), str):
            yield message
        self.value, self.peak = message

    def stop(self) -> None:
        self._pipe.send("")
        self._process.join()


def _serve(pipe, make: Callable[..., Run], arguments: tuple) -> None:
    run = make(*arguments)
    while pipe.recv():
        steps = run()
        try:
            while True:
                pipe.send(next(steps))
        except StopIteration as end:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send((end.value, peak))


def measure(
    runs: Mapping[str, Run],
    rounds: int,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Runs every variant `warm` times to compile and warm up, then `rounds` times in turn."""
    seconds: Seconds = {name: {} for name in runs}
    for number in range(-warm, rounds):
        for name, run in runs.items():
            start = clock()
            for phase in run():
                end = clock()
                if number >= 0:
                    seconds[name].setdefault(phase, []).append(end - start)
                start = end
    return seconds


def median_ratio(seconds: Seconds, name: str, phase: str) -> float:
    """The median over rounds of a phase's time relative to the first variant's in that round."""
    return statistics.median(ratios(seconds, name, phase))


def ratios(seconds: Seconds, name: str, phase: str) -> list[float]:
    """A phase's time relative to the first variant's in every round."""
    base = next(iter(seconds.values()))[phase]
    return [x / y for x, y in zip(seconds[name][phase], base, strict=True)]


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95% interval of the median, between two of the values (no assumption on their spread)."""
    from scipy.stats import binom

    ranked = sorted(values)
    low = max(int(binom.ppf(0.025, len(ranked), 0.5)) - 1, 0)
    return ranked[low], ranked[-1 - low]
