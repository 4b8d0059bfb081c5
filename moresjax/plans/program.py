"""Programs compiled for a TPU slice that need not be there: memory, collectives, least time."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moresjax.hardware.chips import GIB, TpuSlice
from moresjax.models.flops import StepFlops
from moresjax.plans.collectives import collectives, totals

# Compiles several times as fast, to another schedule: peak memory of large models differs by up to
# a tenth, traffic and bounds hardly (docs/plans.md).
QUICK: Any = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      arguments: parameters, and optimizer state and batch, or the batch, or the KV cache.
      temporaries: what the program holds beside them.
      outputs: what it returns, most of it in the place of arguments (`aliased`).
      peak: the most at one time.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program of a configuration needs on a slice.

    Attributes:
      program: `train step`, `prefill` or `decode step`.
      topology: the slice.
      chips: how many.
      mesh: sizes of the mesh axes.
      setting: batch size, lengths, quantize, tuning and the like.
      tokens: how many the program reads, padding included.
      hbm_bytes: memory of a chip.
      memory: None where the compiler found no way to fit.
      needed_bytes: peak, or what the compiler would have needed.
      collectives: runs and bytes per chip, by kind.
      flops: operations on all chips.
      seconds: least time by what bounds it: `compute`, `hbm`, `ici`.
      cache_bytes: keys and values per chip, of a generation.
    """

    program: str
    topology: str
    chips: int
    mesh: dict[str, int]
    setting: dict
    tokens: int
    hbm_bytes: int
    memory: Memory | None
    needed_bytes: int
    collectives: dict[str, dict[str, int]]
    flops: StepFlops
    seconds: dict[str, float]
    cache_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether a chip's memory is enough."""
        return self.memory is not None and self.needed_bytes <= self.hbm_bytes

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def tokens_per_second(self) -> float:
        """At the bound, padding included, all chips."""
        return self.tokens / self.seconds[self.bound]

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        derived = {n: getattr(self, n) for n in ("fits", "bound", "tokens_per_second")}
        return dataclasses.asdict(self) | derived


class Program:
    """A program compiled for a slice.

    Args:
      lowered: the program.
      arguments: what it is given, as shapes with their shardings.
      quick: whether the compiler is to make the least effort (see `QUICK`).

    Attributes:
      compiled: None where the compiler found no way to fit.
      needed_bytes: peak, or what the compiler would have needed.
    """

    def __init__(self, lowered: jax.stages.Lowered, arguments: Any, quick: bool = False) -> None:
        self._lowered = lowered
        self.compiled: jax.stages.Compiled | None = None
        try:
            self.compiled = lowered.compile(QUICK if quick else {})
        except jax.errors.JaxRuntimeError as error:
            self.needed_bytes = _needed(error, bytes_per_chip(arguments))
        else:
            self.needed_bytes = _memory(self.compiled).peak

    @property
    def results(self) -> Any:
        """What it returns, as shapes with their shardings.

        Raises:
          ValueError: where the compiler found no way to fit.
        """
        if self.compiled is None:
            raise ValueError("a program that does not fit has no compiled results")
        return jax.tree.map(shaped, self._lowered.out_info, self.compiled.output_shardings)

    def plan(
        self,
        name: str,
        target: TpuSlice,
        mesh: Mesh,
        *,
        flops: StepFlops,
        hbm: float,
        trip_count: int | None = None,
        **about,
    ) -> Plan:
        """The plan of a program.

        Args:
          name: What it is called.
          target: The slice that it is compiled for.
          mesh: The mesh over that slice.
          flops: Its operations on all chips.
          hbm: Bytes that a chip reads and writes at least.
          trip_count: Assumed for loops that end when something has happened.
          about: Other fields of the plan.
        """
        memory, found = None, {}
        if self.compiled is not None:
            memory = _memory(self.compiled)
            found = totals(collectives(self.compiled.as_text() or "", target.size, trip_count))
        moved = sum(each["bytes"] for each in found.values())
        return Plan(
            program=name,
            topology=target.name,
            chips=target.size,
            mesh=dict(mesh.shape),
            hbm_bytes=target.chip.hbm_bytes,
            memory=memory,
            needed_bytes=self.needed_bytes,
            collectives=found,
            flops=flops,
            seconds={
                "compute": flops.hardware / (target.size * target.chip.flops),
                "hbm": hbm / target.chip.hbm_bandwidth,
                "ici": moved / target.ici_bandwidth,
            },
            **about,
        )


def describe(plan: Plan) -> str:
    """The plan for people."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    setting = ", ".join(f"{name} {value}" for name, value in plan.setting.items())
    lines = [f"{plan.program} on {plan.topology} ({plan.chips} chips; mesh {mesh})", setting]
    verdict = "fits" if plan.fits else "does NOT fit"
    hbm = plan.hbm_bytes / GIB
    lines.append(f"memory per chip: {plan.needed_bytes / GIB:.2f} of {hbm:.0f} GiB: {verdict}")
    if plan.memory is not None:
        parts = dataclasses.asdict(plan.memory).items()
        lines.append("  " + ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts) + " GiB")
    if plan.cache_bytes:
        lines.append(f"KV cache per chip: {plan.cache_bytes / GIB:.3f} GiB")
    for kind, each in plan.collectives.items():
        moved = each["bytes"] / GIB
        lines.append(f"{kind}: {each['times']:.0f} a {plan.program}, {moved:.3f} GiB per chip")
    flops, again = plan.flops, ""
    if flops.hardware > flops.model:
        again = f" (with rematerialisation {flops.hardware:.3e})"
    lines.append(f"FLOPs a {plan.program}: {flops.model:.3e}{again}")
    times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in plan.seconds.items())
    lines.append(f"least time of a {plan.program}: {times}; bound by {plan.bound}")
    lines.append(f"at that bound {plan.tokens_per_second:,.0f} tokens/s")
    return "\n".join(lines)


def weight_bytes(parameters: nnx.State, mesh: Mesh, passes: Mapping[str, int]) -> float:
    """Bytes of weights that a chip reads.

    What `fsdp` has split comes together first. Of an embedding table that is no head as well, next
    to nothing is read.

    Args:
      parameters: The parameters of a model.
      mesh: The mesh that they are placed on.
      passes: How often a part (`llm`, `vision`, ..) is read; those not named are read once.
    """
    total, flat = 0.0, nnx.to_flat_state(parameters)
    has_head = any(path[:2] == ("llm", "head") for path, _ in flat)
    for path, x in flat:
        if has_head and path[:2] == ("llm", "embed"):
            continue
        total += passes.get(str(path[0]), 1) * math.prod(x.shape) * x.dtype.itemsize
    return total / mesh.shape["tensor"]


def bytes_per_chip(tree: Any) -> int:
    """Bytes that a chip holds of arrays, or shapes with shardings, that are split over chips."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def shaped(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _memory(compiled: jax.stages.Compiled) -> Memory:
    found: Any = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        peak=found.peak_memory_in_bytes,
    )


def _needed(error: Exception, arguments: int) -> int:
    """Bytes that the compiler would have needed, from its complaint; other errors go on.

    It names either everything or only the temporaries, which come to the arguments.
    """
    number = r"([\d.]+)([KMGT])"
    whole = re.search(rf"Used {number} of {number} hbm", str(error))
    found = whole or re.search(rf"required for HLO temporaries \({number}\)", str(error))
    if not found:
        raise error
    named = round(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))
    return named if whole else named + arguments
