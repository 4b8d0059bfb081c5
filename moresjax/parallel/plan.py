"""Plans ahead of time: does a run fit a TPU slice, and what bounds its speed, without a TPU.

`plan` compiles the train step of a configuration, with its mesh rules, for chips that need not be
there. Nothing is allocated: parameters, optimizer state and batch are shapes. Memory and
collectives are the compiler's; FLOPs are analytic (`moresjax.parallel.flops`); times are bounds:

    compute  hardware FLOPs / (chips x peak)
    hbm      (weights x passes x microbatches + 2 x state) / bandwidth: each pass reads the weights
             (forward, backward, once more with remat), each step reads and writes what trains
    ici      bytes of the collectives per chip / bandwidth of its links

The largest is the least time that a step can take; a real step takes longer.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moresjax.build import model_config
from moresjax.data.pipeline import rows_held
from moresjax.data.sources import SOURCES
from moresjax.errors import UserError
from moresjax.layout import Batch, TokenLayout
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.parallel.chips import GIB, Slice, find_slice
from moresjax.parallel.collectives import collectives, totals
from moresjax.parallel.flops import StepFlops, train_flops
from moresjax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    make_mesh,
    mesh_preset,
    parameter_shardings,
    replicated,
)
from moresjax.training.loop import check_numbers, jitted_step
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import TrainState, split_model

SETTING = ("batch_size", "microbatches", "length", "images", "remat", "quantize", "attention")
SETTING += ("tuning",)
PRESETS = ("replicated", "fsdp", "fsdp+tensor")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      arguments: parameters, optimizer state and batch.
      temporaries: what the step holds beside them.
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
    """What a configuration needs on a slice.

    Attributes:
      topology: the slice.
      chips: how many.
      mesh: sizes of the mesh axes.
      setting: batch size, microbatches, length, remat, quantize and tuning of the run.
      hbm_bytes: memory of a chip.
      memory: None where the compiler found no way to fit.
      needed_bytes: peak, or what the compiler would have needed.
      collectives: runs and bytes per chip and step, by kind.
      flops: operations of a step on all chips.
      seconds: least time of a step by what bounds it: `compute`, `hbm`, `ici`.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    setting: dict
    hbm_bytes: int
    memory: Memory | None
    needed_bytes: int
    collectives: dict[str, dict[str, int]]
    flops: StepFlops
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed_bytes <= self.hbm_bytes

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def tokens_per_second(self) -> float:
        """At the bound, padding included, all chips."""
        tokens = self.setting["batch_size"] * self.setting["length"]
        return tokens / self.seconds[self.bound]

    def to_dict(self) -> dict:
        derived = {n: getattr(self, n) for n in ("fits", "bound", "tokens_per_second")}
        return dataclasses.asdict(self) | derived


def plan(config, topology: str) -> Plan:
    """Compiles the train step of a configuration for a slice.

    Args:
      config: a run's configuration; its folders are not read.
      topology: `v5e-8` or `v5e:2x4`, see `find_slice`.

    Raises:
      UserError: for a configuration that cannot run, or without libtpu.
    """
    target = find_slice(topology)
    mesh = make_mesh(**config.mesh, devices=target.devices())
    check_numbers(config, batch_shards(mesh))
    state, frozen, batch, step = abstract_step(config, mesh)
    flops = train_flops(
        model_config(config),
        state.trainable,
        frozen,
        rows=config.batch_size,
        length=config.length,
        images=config.images,
    )
    try:
        compiled = step.lower(state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        held = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves((state, frozen, batch))
        )
        memory, needed, found = None, _needed(error, held), {}
    else:
        memory = _memory(compiled)
        needed, found = memory.peak, totals(collectives(compiled.as_text(), target.size))
    return Plan(
        topology=target.name,
        chips=target.size,
        mesh=dict(mesh.shape),
        setting={k: config[k] for k in SETTING},
        hbm_bytes=target.chip.hbm_bytes,
        memory=memory,
        needed_bytes=needed,
        collectives=found,
        flops=flops,
        seconds=_seconds(config, target, mesh, state, frozen, flops, found),
    )


def abstract_step(config, mesh: Mesh):
    """State, frozen part and batch as shapes with their shardings, and the jitted train step.

    Raises:
      UserError: for a configuration without a language model.
    """
    if config.objective != "next_token":
        raise UserError(f"plans are for objective next_token, got {config.objective!r}")
    architecture = model_config(config)
    model = MLLM(architecture, config.tuning)
    graphdef, trainable, frozen = split_model(model, config.also_train)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps, trainable)
    trainable = _placed(trainable, parameter_shardings(trainable, mesh))
    frozen = _stored(frozen, architecture.llm.dtype)
    frozen = _placed(frozen, parameter_shardings(frozen, mesh))
    whole = replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, parameter: _shape(moment, parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: _shape(x, whole),
    )
    # Not a call of TrainState: its fields are checked, and these are shapes.
    state = jax.eval_shape(
        lambda t: TrainState(jnp.zeros((), jnp.int32), t, optimizer.init(t)), trainable
    )
    step_shape = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    leaves = [step_shape, *jax.tree.leaves((trainable, moments))]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    rows = batch_sharding(mesh)
    batch = jax.tree.map(lambda x: _shape(x, rows), abstract_batch(config, architecture))
    step = jitted_step(config, graphdef, optimizer, schedule, state, mesh)
    return state, frozen, batch, step


def abstract_batch(config, architecture: MLLMConfig) -> Batch:
    """Shapes of a batch as the data pipeline makes it, every row with its images."""
    vision = architecture.vision
    holds = rows_held(SOURCES.get(config.data.name), config.batching)

    def build():
        field = jnp.zeros((config.batch_size, config.length), jnp.int32)
        layout = TokenLayout(*[field] * 5, visual_tokens=architecture.visual_tokens)
        if vision is None or not config.images:
            return Batch(field, layout, holds=holds)
        size = vision.image_size
        pixels = jnp.zeros((config.batch_size, config.images, size, size, 3), jnp.float32)
        return Batch(field, layout, pixels, holds=holds)

    return jax.eval_shape(build)


def _shape(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(state: nnx.State, shardings: nnx.State) -> nnx.State:
    return jax.tree.map(_shape, state, shardings)


def _stored(frozen: nnx.State, dtype: str) -> nnx.State:
    """The frozen part as checkpoints hold it: in the dtype of the activations, but for whole
    numbers and the factors of int8 kernels."""

    def as_stored(variable):
        x, how = variable.get_value(), variable.get_metadata()
        kept = x.dtype != jnp.float32 or "derived" in how
        return variable.replace(jax.ShapeDtypeStruct(x.shape, x.dtype if kept else dtype))

    return jax.tree.map(as_stored, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _memory(compiled) -> Memory:
    found = compiled.memory_analysis()
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


def _seconds(config, target: Slice, mesh: Mesh, state, frozen, flops, found) -> dict[str, float]:
    chip = target.chip
    weights = 0.0
    for part in (state.trainable, frozen):
        for path, x in nnx.to_flat_state(part):
            passes = (3 if config.remat else 2) if path[0] == "llm" else 1
            weights += passes * math.prod(x.shape) * x.dtype.itemsize
    weights *= config.microbatches / mesh.shape["tensor"]
    kept = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    moved = sum(each["bytes"] for each in found.values())
    return {
        "compute": flops.hardware / (target.size * chip.flops),
        "hbm": (weights + 2 * kept) / chip.hbm_bandwidth,
        "ici": moved / target.ici_bandwidth,
    }


def search(
    config, topology: str, *, batches: Sequence[int], presets: Sequence[str] = PRESETS
) -> list[Plan]:
    """Plans for every batch size, remat on and off, and mesh preset; the best that fits is first.

    A setting is left out when a smaller batch did not fit already, or its batch does not divide.

    Args:
      config: a run's configuration.
      topology: as in `plan`.
      batches: global batch sizes.
      presets: names of meshes, see `mesh_preset`.
    """
    size = find_slice(topology).size
    found: list[Plan] = []
    for preset, remat in itertools.product(presets, (False, True)):
        for batch in sorted(batches):
            tried = config.copy_and_resolve_references()
            tried.mesh.update(mesh_preset(preset, size))
            tried.remat, tried.batch_size = remat, batch
            shards = tried.mesh.data * tried.mesh.fsdp * tried.microbatches
            if batch % shards:
                continue
            found.append(plan(tried, topology))
            if not found[-1].fits:
                break
    if not found:
        raise UserError(f"none of the batch sizes {list(batches)} divides over {topology}")
    return sorted(found, key=lambda p: (not p.fits, -p.tokens_per_second))


def describe(plan: Plan) -> str:
    """The plan for people."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    setting = ", ".join(f"{name} {value}" for name, value in plan.setting.items())
    lines = [f"{plan.topology} ({plan.chips} chips; mesh {mesh})", setting]
    verdict = "fits" if plan.fits else "does NOT fit"
    hbm = plan.hbm_bytes / GIB
    lines.append(f"memory per chip: {plan.needed_bytes / GIB:.2f} of {hbm:.0f} GiB: {verdict}")
    if plan.memory is not None:
        parts = dataclasses.asdict(plan.memory).items()
        lines.append("  " + ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts) + " GiB")
    for kind, each in plan.collectives.items():
        moved = each["bytes"] / GIB
        lines.append(f"{kind}: {each['times']:.0f} a step, {moved:.3f} GiB per chip")
    flops = plan.flops
    lines.append(f"FLOPs a step: {flops.model:.3e} (with rematerialisation {flops.hardware:.3e})")
    times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in plan.seconds.items())
    lines.append(f"least time of a step: {times}; bound by {plan.bound}")
    lines.append(f"at that bound {plan.tokens_per_second:,.0f} tokens/s")
    return "\n".join(lines)
