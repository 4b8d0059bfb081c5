"""What a run needs before its first step: data, model, train step, and the newest checkpoint."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.folders import check_writable, make_folder
from moresjax.core.locks import FolderLock
from moresjax.core.plugins import active_plugins
from moresjax.core.ranges import check_ranges
from moresjax.core.reading import read_json
from moresjax.data.check import count_cut
from moresjax.data.pipeline import Batches
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.models.mllm import MLLM
from moresjax.runs.budget import check_budget, with_steps
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import load_config, save_config
from moresjax.runs.data import build_iterator, build_sources
from moresjax.runs.identity import check_identity, run_identity
from moresjax.runs.init_tuning import save_shared
from moresjax.runs.paths import with_absolute_paths
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import AnyConfig, RunConfig, resolve
from moresjax.runs.saved_identity import saved_identity
from moresjax.runs.sources import check_same_tokenizer, check_sources, with_sources
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import batch_shards, make_mesh, replicated, shard_params
from moresjax.training.checks import check_samples, check_start, check_workdir
from moresjax.training.evaluators import Evaluators
from moresjax.training.objectives import get_objective
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import jitted_step, split_model

logger = logging.getLogger(__name__)

Sources = tuple[Source, Source | None]
# `(state, frozen, batch) -> (state, metrics)`
StepFunction = Callable[..., Any]
# `(config, graphdef, trainable, frozen, mesh) -> (state, frozen, step)`: the state of a new run,
# its frozen parameters, which may be those of another run, and its compiled step.
MakeStep = Callable[..., tuple[TrainState, nnx.State, StepFunction]]


# Written at the end of a run.
RESULT = "train.json"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
      step: Steps done.
      metrics: The metrics of the last step, and the last ones of every evaluator.
      seconds: Time of this process in the loop, without compilation.
      compile_seconds: Time of the first step, which compiles.
    """

    step: int
    metrics: dict[str, float]
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run whose settings, data and directory have been checked; nothing is written yet.

    Attributes:
      config: The run's configuration, with its length in steps.
      workdir: The run's directory.
      finished: The result of a run that has nothing left to do; the rest is None then.
      processor: The processor of the model.
      sources: Training samples, and validation samples if there are any.
      resume: `auto` or `never`.
    """

    config: RunConfig
    workdir: Path
    finished: TrainResult | None = None
    processor: Processor | None = None
    sources: Sources | None = None
    resume: str = "auto"


@dataclasses.dataclass
class Run:
    """Everything that the loop needs, built and restored.

    Attributes:
      config: The run's configuration.
      workdir: The run's directory.
      processor: The processor of the model.
      iterator: Batches of training samples.
      evaluators: What is measured now and then.
      graphdef: Definition of the model.
      frozen: Parameters that do not train.
      state: The state to start from.
      first: Steps that were done before.
      samples_seen: Samples that were trained on before.
      num_samples: Samples that there are.
      step_fn: `(state, frozen, batch) -> (state, metrics)`.
      mesh: The devices.
      checkpoints: Where the state is saved.
      held: What is let go of at the end: the lock of the directory and the checkpoints.
    """

    config: RunConfig
    workdir: Path
    processor: Processor
    iterator: Batches
    evaluators: Evaluators
    graphdef: nnx.GraphDef
    frozen: nnx.State
    state: TrainState
    first: int
    samples_seen: int
    num_samples: int
    step_fn: Callable[..., Any]
    mesh: Mesh
    checkpoints: Checkpoints
    held: contextlib.ExitStack

    @property
    def speaks(self) -> bool:
        """Whether this process writes for all."""
        return jax.process_index() == 0


def check(
    config: AnyConfig | str,
    workdir: str | Path,
    resume: str = "auto",
    read_sources: Callable[[RunConfig], Sources] = build_sources,
) -> Checked:
    """Resolves a run's configuration and refuses what cannot run, before anything is written.

    Args:
      config: What `train` takes.
      workdir: The run's directory.
      resume: `auto` or `never`.
      read_sources: Reads the samples.

    Raises:
      UserError: for a configuration that cannot run, or a directory of another run.
    """
    config = load_config(config) if isinstance(config, str) else resolve(config)
    workdir, config = Path(workdir), dataclasses.replace(config, plugins=tuple(active_plugins()))
    check_ranges(config, "config key ")
    get_objective(config.objective)  # an unknown name is told before anything is built
    check_budget(config)
    asked = with_sources(config, workdir)
    config = with_absolute_paths(asked)
    if config.steps and (finished := _finished(config, workdir, resume)):
        return Checked(config, workdir, finished)
    check_writable(workdir)
    processor = _checked_start(asked, workdir)
    sources = read_sources(config)
    check_samples(config, sources[0])
    if not config.steps:
        config = with_steps(config, sources[0], lambda: processor)
        if finished := _finished(config, workdir, resume):
            return Checked(config, workdir, finished)
    return Checked(config, workdir, None, processor, sources, resume)


def _checked_start(config: RunConfig, workdir: Path) -> Processor:
    """The processor of a run that may start; everything is looked at that needs no data."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    processor = build_processor(config, root=workdir)
    check_start(config, batch_shards(mesh), processor)
    check_sources(config, workdir)
    check_same_tokenizer(config, workdir, processor.tokenizer)
    return processor


def _finished(config: RunConfig, workdir: Path, resume: str) -> TrainResult | None:
    """The result of a run that has nothing left to do; refuses the directory of another one."""
    check_workdir(config, workdir, resume)
    if not (workdir / RESULT).is_file():
        return None
    try:
        result = TrainResult(**read_json(workdir / RESULT, TrainResult))
        return result if result.step >= config.steps else None
    except (UserError, TypeError) as error:
        logger.warning("%s is made again from the newest checkpoint: %s", workdir / RESULT, error)
        return None


def prepare(
    checked: Checked, make_step: MakeStep | None = None, *, allow_pickle: bool = False
) -> Run:
    """Builds the data, the model and the train step, and restores the newest checkpoint.

    Args:
      checked: What `check` has found of a run that is not finished.
      make_step: Makes the state and the step; default: a compiled step of the run's own.
      allow_pickle: Whether pickles of base parts and adapters may be read.
    """
    config, workdir, processor = checked.config, checked.workdir, checked.processor
    assert processor is not None  # a finished run has neither
    assert checked.sources is not None
    mesh = make_mesh(**dataclasses.asdict(config.mesh))

    # Data: before the model, whose reading takes longer than finding a mistake here.
    training, held_out = checked.sources
    iterator = build_iterator(config, processor, training)
    evaluators = Evaluators(config, processor, mesh, training, held_out)
    for kind, count in count_cut(training, processor).items() if jax.process_index() == 0 else ():
        samples = f"{count:,d} of {len(training):,d} samples"
        logger.warning("%s go without their %s; `moresjax data check` lists them", samples, kind)

    # Model, split into what trains and what does not, each on the mesh.
    model = build_model(config, root=workdir, mesh=mesh, allow_pickle=allow_pickle)
    graphdef, trainable, frozen = split_model(model, config.also_train)
    state, frozen, step_fn = (make_step or own_step)(config, graphdef, trainable, frozen, mesh)

    # Resume.
    identity = run_identity(config, frozen, processor, training)
    check_identity(saved_identity(workdir / "checkpoints")[1], identity, str(workdir))
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:  # one process writes for all
            stack.enter_context(FolderLock(workdir))
            check_workdir(config, workdir, checked.resume)  # what another run wrote meanwhile
            make_folder(workdir / "checkpoints")
            save_config(config, workdir / "config.json")
            if isinstance(model, MLLM):
                save_shared(model.tuning, workdir)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        checkpoints.identity = identity
        stack.callback(checkpoints.close)
        samples_seen = 0
        if restored := checkpoints.restore(state):
            state, position = restored
            iterator.set_state(position)
            # Version 0.2 did not count them.
            samples_seen = position.get("samples_seen", int(state.step) * config.batch_size)
        held = stack.pop_all()
    return Run(
        config=config,
        workdir=workdir,
        processor=processor,
        iterator=iterator,
        evaluators=evaluators,
        graphdef=graphdef,
        frozen=frozen,
        state=state,
        first=int(state.step),
        samples_seen=samples_seen,
        num_samples=len(training),
        step_fn=step_fn,
        mesh=mesh,
        checkpoints=checkpoints,
        held=held,
    )


def own_step(
    config: RunConfig, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State, mesh: Mesh
) -> tuple[TrainState, nnx.State, StepFunction]:
    """A new run's state and frozen parameters on the mesh, and a compiled step of its own."""
    optimizer, schedule = make_optimizer(config.optimizer, config.steps, trainable)
    state = new_state(optimizer, trainable, mesh)
    step = jitted_step(config, graphdef, optimizer, schedule, state, mesh)
    return state, shard_params(frozen, mesh), step


def new_state(
    optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh
) -> TrainState:
    """The state on the mesh that a run starts from."""
    trainable = shard_params(trainable, mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(zero, trainable, place_optimizer(optimizer, trainable, mesh))


def place_optimizer(
    optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Mesh
) -> optax.OptState:
    """Optimizer state on the mesh: moments like their parameters, the rest replicated."""
    opt_state = jax.jit(optimizer.init)(trainable)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, parameter: jax.device_put(moment, parameter.sharding),
        opt_state,
        trainable,
        transform_non_params=lambda x: jax.device_put(x, replicated(mesh)),
    )
