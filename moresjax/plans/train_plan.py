"""Plans ahead of time: does a run fit a TPU slice, and what bounds its speed, without a TPU.

`plan` compiles the train step of a configuration, with its mesh rules, for chips that need not be
there; `moresjax.plans.generation_plan` prefill and decode step of its model. Nothing is
allocated: parameters, optimizer state and batch are shapes. Memory and collectives are the
compiler's; FLOPs are analytic (`moresjax.models.flops`); times are bounds:

    compute  hardware FLOPs / (chips x peak)
    hbm      (weights x passes x microbatches + 2 x state) / bandwidth: each pass reads the weights
             (forward, backward, once more with remat), each step reads and writes what trains
    ici      bytes of the collectives per chip / bandwidth of its links

The largest is the least time that a step can take; a real step takes longer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, RowStructure, TokenLayout
from moresjax.core.ranges import check_ranges
from moresjax.data.pipeline import structure_for
from moresjax.data.sources import source_class
from moresjax.hardware.chips import TpuSlice, find_slice
from moresjax.models.flops import train_flops
from moresjax.models.mllm import MLLM
from moresjax.plans.program import Plan, Program, bytes_per_chip, shaped, weight_bytes
from moresjax.runs.architecture import model_config
from moresjax.runs.run_config import AnyConfig, MeshConfig, RunConfig, resolve
from moresjax.runs.sources import with_sources
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import (
    PRESETS,
    batch_sharding,
    batch_shards,
    make_mesh,
    mesh_preset,
    parameter_shardings,
    replicated,
)
from moresjax.training.checks import check_start
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import jitted_step, split_model

SETTING = (
    "batch_size",
    "microbatches",
    "max_seq_len",
    "images_per_row",
    "remat",
    "quantize",
    "attention",
)
SETTING += ("tuning",)


def plan(config: AnyConfig, topology: str, quick: bool = False) -> Plan:
    """Compiles the train step of a configuration for a slice.

    Example:
      >>> from moresjax.runs.config import load_config
      >>> init = [f"init.{part}=random" for part in ("llm", "vision", "connector")]
      >>> plan(load_config("digits:stage=finetune", init), "v5e:2x2", quick=True).fits
      True

    Args:
      config: A run's configuration; its folders are not read, but for what the architecture is
        where only they say it.
      topology: `v5e-8` or `v5e:2x4`, see `find_slice`.
      quick: Whether to compile with the least effort (see `program.QUICK`).

    Raises:
      UserError: for a configuration that cannot run, or without libtpu.
    """
    config = with_sources(resolve(config), ".")
    check_ranges(config, "config key ")
    mesh = find_mesh(config, topology)[1]
    check_language_model(config)
    check_start(config, batch_shards(mesh))
    return _plan(config, topology, quick)


def _plan(config: RunConfig, topology: str, quick: bool) -> Plan:
    """The plan of a configuration that was checked."""
    target, mesh = find_mesh(config, topology)
    state, frozen, batch, step = abstract_step(config, mesh)
    flops = train_flops(
        model_config(config),
        state.trainable,
        frozen,
        rows=config.batch_size,
        length=config.max_seq_len,
        images=config.images_per_row,
    )
    parameters = nnx.merge_state(state.trainable, frozen)
    weights = weight_bytes(parameters, mesh, {"llm": 3 if config.remat else 2})
    arguments = state, frozen, batch
    return Program(step.lower(*arguments), arguments, quick).plan(
        "train step",
        target,
        mesh,
        setting={key: getattr(config, key) for key in SETTING} | {"quick": quick},
        tokens=config.batch_size * config.max_seq_len,
        flops=flops,
        hbm=config.microbatches * weights + 2 * bytes_per_chip(state),
    )


def check_language_model(config: RunConfig) -> None:
    """Refuses a configuration without a language model.

    Raises:
      UserError: for such a configuration.
    """
    if not config.is_language_model:
        raise UserError(f"plans are for language models, not for objective {config.objective}")


def find_mesh(config: RunConfig, topology: str) -> tuple[TpuSlice, Mesh]:
    """A slice by name, and the mesh of a configuration over its chips."""
    target = find_slice(topology)
    return target, make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices())


def abstract_model(config: RunConfig, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model of a configuration, what trains in it and what does not.

    All arrays are shapes with their shardings.

    Raises:
      UserError: for a configuration without a language model.
    """
    check_language_model(config)
    architecture = model_config(config)
    model = MLLM(architecture, config.tuning)
    graphdef, trainable, frozen = split_model(model, config.also_train)
    frozen = _stored(frozen, architecture.llm.dtype)
    return graphdef, _placed(trainable, mesh), _placed(frozen, mesh)


def abstract_step(
    config: RunConfig, mesh: Mesh
) -> tuple[TrainState, nnx.State, Batch, Callable[..., Any]]:
    """State, frozen part and batch as shapes with their shardings, and the jitted train step.

    Raises:
      UserError: for a configuration without a language model.
    """
    graphdef, trainable, frozen = abstract_model(config, mesh)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps, trainable)
    whole = replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, parameter: shaped(moment, parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: shaped(x, whole),
    )
    # Not a call of TrainState: its fields are checked, and these are shapes.
    state = jax.eval_shape(
        lambda t: TrainState(jnp.zeros((), jnp.int32), t, optimizer.init(t)), trainable
    )
    step_shape = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    leaves = [step_shape, *jax.tree.leaves((trainable, moments))]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    structure = structure_for(source_class(config.data["name"]), config.batching)
    if config.data.get("turns") == "independent":
        structure = RowStructure.ANY
    batch = abstract_batch(config, mesh, config.max_seq_len, structure)
    step = jitted_step(config, graphdef, optimizer, schedule, state, mesh)
    return state, frozen, batch, step


def abstract_batch(config: RunConfig, mesh: Mesh, length: int, structure: RowStructure) -> Batch:
    """Shapes of a batch of rows of `length` tokens, every row with its images."""
    architecture = model_config(config)
    vision, rows = architecture.vision, batch_sharding(mesh)

    def build() -> Batch:
        field = jnp.zeros((config.batch_size, length), jnp.int32)
        layout = TokenLayout(*[field] * 5, visual_tokens=architecture.visual_tokens)
        if vision is None or not config.images_per_row:
            return Batch(field, layout, structure=structure)
        size = vision.image_size
        pixels = jnp.zeros((config.batch_size, config.images_per_row, size, size, 3), jnp.float32)
        return Batch(field, layout, pixels, structure=structure)

    return jax.tree.map(lambda x: shaped(x, rows), jax.eval_shape(build))


def _placed(state: nnx.State, mesh: Mesh) -> nnx.State:
    return jax.tree.map(shaped, state, parameter_shardings(state, mesh))


def _stored(frozen: nnx.State, dtype: str) -> nnx.State:
    """The frozen part as checkpoints hold it.

    That is in the dtype of the activations, but for whole numbers and the factors of int8 kernels.
    """

    def as_stored(variable: nnx.Variable) -> nnx.Variable:
        x, how = variable.get_value(), variable.get_metadata()
        kept = x.dtype != jnp.float32 or "derived" in how
        return variable.replace(jax.ShapeDtypeStruct(x.shape, x.dtype if kept else dtype))

    return jax.tree.map(as_stored, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def search(
    config: AnyConfig,
    topology: str,
    *,
    batches: Sequence[int],
    presets: Sequence[str] = tuple(PRESETS),
    quick: bool = False,
) -> list[Plan]:
    """Plans for every batch size, remat on and off, and mesh preset; the best that fits is first.

    A setting is left out when a smaller batch did not fit already, or its batch does not divide.

    Args:
      config: A run's configuration; its folders are not read.
      topology: `v5e-8` or `v5e:2x4`, see `find_slice`.
      batches: Global batch sizes.
      presets: Names of meshes, see `mesh_preset`.
      quick: Whether to compile with the least effort (see `program.QUICK`).

    Raises:
      UserError: for a configuration that cannot run, without libtpu, or when no batch size divides.
    """
    config, size = with_sources(resolve(config), "."), find_slice(topology).size
    found: list[Plan] = []
    for preset, remat in itertools.product(presets, (False, True)):
        for batch in sorted(batches):
            mesh = MeshConfig(**mesh_preset(preset, size))
            tried = dataclasses.replace(config, mesh=mesh, remat=remat, batch_size=batch)
            shards = tried.mesh.data * tried.mesh.fsdp * tried.microbatches
            if batch % shards:
                continue
            # The first one is checked; the others differ in what was checked here.
            found.append((_plan if found else plan)(tried, topology, quick))
            if not found[-1].fits:
                break
    if not found:
        raise UserError(f"none of the batch sizes {list(batches)} divides over {topology}")
    return sorted(found, key=lambda p: (not p.fits, -p.tokens_per_second))
