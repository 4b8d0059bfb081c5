"""Collectives of a compiled program and the bytes they move, read from its HLO text.

A collective inside a loop counts once per iteration. Bytes are those that a chip sends or receives
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
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"(%\S+) = [su]32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r" = [su]32\[\]\S* get-tuple-element\(.*index=(\d+)")
_LIMITED = re.compile(r"ROOT \S+ = pred\[\]\S* compare\(.*direction=LT")
_ROOT = re.compile(r"ROOT \S+ = .* tuple\((.*?)\)")
_ADD = re.compile(r"(%\S+) = [su]32\[\]\S* add\((%\S+), (%\S+)\)")
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


def collectives(hlo: str, devices: int, trip_count: int | None = None) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      hlo: Text of the optimised program (`compiled.as_text()`).
      devices: Number of chips that run it, the group of collectives that name none.
      trip_count: Assumed for data-dependent loops, whose number of iterations HLO does not tell.

    Raises:
      ValueError: for a loop with collectives whose number of iterations is unknown.
    """
    bodies, entry = _computations(hlo)

    @functools.cache
    def inside(name: str) -> dict[object, Collective]:
        # By channel: TPU programs cut a collective into several pieces, all of one channel.
        found = {}
        for line in bodies.get(name, ()):
            if own := _collective(line, name, devices):
                channel = _CHANNEL.search(line)
                found.setdefault((channel[1], own) if channel else line, own)
            if "async-done(" in line or "async-update(" in line:
                continue  # names the computation that async-start has run
            names = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                names += [called.strip().lstrip("%") for called in group.split(",")]
            called = {key: c for n in names for key, c in inside(n).items()}
            if called and " while(" in line:
                number = _trip_count(line, bodies)
                number = trip_count if number is None else number
                if number is None:
                    loop = line.strip()
                    raise ValueError(f"a loop with collectives hides how often it runs: {loop}")
                called = {
                    key: dataclasses.replace(c, times=c.times * number) for key, c in called.items()
                }
            for key, each in called.items():
                found.setdefault(key, each)
        return found

    return list(inside(entry).values())


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Runs and bytes per chip by kind."""
    times, moved = Counter(), Counter()
    for each in found:
        times[each.kind] += each.times
        moved[each.kind] += round(each.times * each.bytes)
    return {kind: {"times": times[kind], "bytes": moved[kind]} for kind in KINDS if times[kind]}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the one that is run.

    A computation goes on until the next one starts: the text of a kernel inside has closing
    brackets of its own.
    """
    bodies, entry, name = {}, "", None
    for line in hlo.splitlines():
        if started := _COMPUTATION.match(line):
            name = started[2]
            bodies[name] = []
            entry = name if started[1] else entry
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
    group = _group(line, devices)
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


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop runs: what the compiler notes, or the limit of its counter over its step.

    None where that is not all that it depends on.
    """
    if noted := _TRIPS.search(line):
        return int(noted[1])
    named, body = _CONDITION.search(line), _BODY.search(line)
    if not named or not body:
        return None
    condition = "\n".join(bodies.get(named[1], ()))
    limits, counter = _CONSTANT.findall(condition), _COUNTER.findall(condition)
    if len(limits) != 1 or len(counter) != 1 or not _LIMITED.search(condition):
        return None
    step = _step(bodies[body[1]], int(counter[0]))
    return math.ceil(int(limits[0][1]) / step)


def _step(body: list[str], counter: int) -> int:
    """What a loop adds to its counter.

    TPU programs do two iterations in one and count by 2. A sum that is hidden in a fusion is one
    of 1.
    """
    constants = {name: int(value) for line in body for name, value in _CONSTANT.findall(line)}
    root = _ROOT.search("\n".join(body))
    if not root:
        return 1
    result = re.sub(r"/\*.*?\*/", "", root[1]).split(", ")[counter]
    for line in body:
        added = _ADD.search(line)
        if added and added[1] == result:
            return next((constants[n] for n in added.groups() if n in constants), 1)
    return 1


def _group(line: str, devices: int) -> int:
    """Chips that take part in one instance of a collective."""
    found = _GROUPS.search(line)
    if not found:
        return devices
    size, members, axes, used = found.groups()
    if axes is not None:  # mesh['a'=2,'b'=4] {'b'}
        sizes = dict(axis.split("=") for axis in axes.split(","))
        return math.prod(int(sizes[name]) for name in used.split(","))
    return int(size) if size else len(members.split(","))


def _bytes(shape: tuple[str, str]) -> float:
    dtype, dims = shape
    bits = _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype))
    return math.prod(int(n) for n in dims.split(",") if n) * bits / 8
