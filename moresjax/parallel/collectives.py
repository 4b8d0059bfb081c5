"""Collectives of a compiled program and the bytes they move, read from its HLO text.

A collective inside a loop counts once per turn. Bytes are those that a chip sends or receives
around a ring of g chips: (g-1)/g of the gathered or scattered array, twice that for all-reduce.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      kind: one of `KINDS`.
      shape: its output as HLO writes it, `bf16[4096,4096]`.
      times: how often it runs.
      bytes: what a chip moves each time.
    """

    kind: str
    shape: str
    times: int
    bytes: float


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      hlo: text of the optimised program (`compiled.as_text()`).
      devices: chips that run it, the group of collectives that name none.

    Raises:
      ValueError: for a loop with collectives whose number of turns is unknown.
    """
    bodies, entry = _computations(hlo)

    @functools.cache
    def inside(name: str) -> tuple[Collective, ...]:
        found = []
        for line in bodies.get(name, ()):
            if own := _collective(line, name, devices):
                found.append(own)
            if "async-done(" in line or "async-update(" in line:
                continue  # names the computation that async-start has run
            names = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                names += [called.strip().lstrip("%") for called in group.split(",")]
            called = [c for n in names for c in inside(n)]
            found += _repeated(called, line) if " while(" in line else called
        return tuple(found)

    return list(inside(entry))


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Runs and bytes per chip by kind."""
    times, moved = Counter(), Counter()
    for each in found:
        times[each.kind] += each.times
        moved[each.kind] += each.times * each.bytes
    return {kind: {"times": times[kind], "bytes": moved[kind]} for kind in KINDS if times[kind]}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the one that is run."""
    bodies, entry, name = {}, "", None
    for line in hlo.splitlines():
        if started := _COMPUTATION.match(line):
            name = started[2]
            bodies[name] = []
            entry = name if started[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _collective(line: str, computation: str, devices: int) -> Collective | None:
    if not (found := _COLLECTIVE.search(line)):
        return None
    text, kind, started = found.groups()
    shapes = [shape for shape in _SHAPE.findall(text) if shape != ("u32", "")]
    if started and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # inputs, then outputs
    size = sum(map(_bytes, shapes))
    groups = _GROUPS.search(line)
    group = devices
    if groups:
        group = int(groups[1]) if groups[1] else len(groups[2].split(","))
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # What TPUs fuse with the slice that follows.
        kind, size = "reduce-scatter", size / group
    share = (group - 1) / group
    moved = {
        "all-reduce": 2 * share * size,
        "reduce-scatter": share * group * size,
        "collective-permute": size,
    }.get(kind, share * size)
    shape = ", ".join(f"{dtype}[{dims}]" for dtype, dims in shapes)
    return Collective(kind, shape, 1, moved)


def _repeated(called: list[Collective], line: str) -> list[Collective]:
    if not called:
        return []
    trips = _TRIPS.search(line)
    if not trips:
        raise ValueError(f"a loop with collectives does not say how often it runs: {line.strip()}")
    return [dataclasses.replace(c, times=c.times * int(trips[1])) for c in called]


def _bytes(shape: tuple[str, str]) -> float:
    dtype, dims = shape
    bits = _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype))
    return math.prod(int(n) for n in dims.split(",") if n) * bits / 8
