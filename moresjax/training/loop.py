"""Training: `train(config, workdir)` reads top to bottom."""

import contextlib
import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from moresjax.core.errors import UserError
from moresjax.core.plugins import active_plugins
from moresjax.core.ranges import check_ranges
from moresjax.data.check import count_cut
from moresjax.data.pipeline import Batches, to_device_batch
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.models.mllm import MLLM
from moresjax.runs.budget import check_budget, with_steps
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints, saved_identity
from moresjax.runs.config import load_config, save_config
from moresjax.runs.data import build_iterator, build_sources
from moresjax.runs.identity import check_identity, run_identity
from moresjax.runs.init_tuning import save_shared
from moresjax.runs.paths import with_absolute_paths
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import AnyConfig, RunConfig, resolve
from moresjax.runs.sources import check_same_tokenizer, check_sources, with_sources
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import batch_sharding, batch_shards, make_mesh, replicated, shard_params
from moresjax.sharding.processes import PreemptionHandler
from moresjax.training.checks import check_samples, check_start, check_workdir
from moresjax.training.evaluators import Evaluators
from moresjax.training.metrics import MetricWriter, ProgressBar
from moresjax.training.objectives import get_objective
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import jitted_step, split_model
from moresjax.training.throughput import ThroughputMeter

logger = logging.getLogger(__name__)

# Written at the end of a run.
RESULT = "train.json"
# Samples that could not be used, by process.
SKIPPED = "skipped_samples_{}.json"
# Steps that may be under way before their loss is looked at.
IN_FLIGHT = 2


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


def train(
    config: AnyConfig | str,
    workdir: str | Path,
    *,
    resume: str = "auto",
    allow_pickle: bool = False,
) -> TrainResult:
    """Runs the training that a configuration describes and leaves its checkpoints in `workdir`.

    Example:
      >>> import tempfile
      >>> config = load_config("digits:stage=llm", ["steps=1", "batch_size=8", "tensorboard=False"])
      >>> train(config, tempfile.mkdtemp()).step
      1

    Args:
      config: A `RunConfig`, the `ConfigDict` that `base_config` and config files make, or what
        `load_config` reads: a config file or a packaged name with its arguments.
      workdir: The run's directory; paths of `config.init` with a leading dot start there.
      resume: `auto` goes on from the newest intact checkpoint; `never` wants an empty directory.
      allow_pickle: Whether `*.bin` files of base parts may be read where there are no safetensors,
        and a pyreft folder as `init.tuning`.

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
        return finished
    processor = _checked_start(asked, workdir)
    sources = build_sources(config)
    check_samples(config, sources[0])
    if not config.steps:
        config = with_steps(config, sources[0], lambda: processor)
        if finished := _finished(config, workdir, resume):
            return finished
    run = _prepare(config, workdir, sources, processor, allow_pickle)
    if run.first:
        logger.info("resuming %s at step %d", config.name, run.first)
    result, stopped = _loop(run)
    if stopped:
        logger.warning("stopped at step %d, which is saved; the same command goes on", result.step)
    elif run.speaks:
        (workdir / RESULT).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _checked_start(config: RunConfig, workdir: Path) -> Processor:
    """The processor of a run that may start; everything is looked at that needs no data."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    processor = build_processor(config, root=workdir)
    check_start(config, batch_shards(mesh), processor)
    check_sources(config, workdir)
    check_same_tokenizer(config, workdir, processor.tokenizer)
    return processor


@dataclasses.dataclass
class _Run:
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

    @property
    def speaks(self) -> bool:
        """Whether this process writes for all."""
        return jax.process_index() == 0


def _prepare(
    config: RunConfig,
    workdir: Path,
    sources: tuple[Source, Source | None],
    processor: Processor,
    allow_pickle: bool,
) -> _Run:
    """Builds the data, the model and the train step, and restores the newest checkpoint."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))

    # Data: before the model, whose reading takes longer than finding a mistake here.
    training, held_out = sources
    iterator = build_iterator(config, processor, training)
    evaluators = Evaluators(config, processor, mesh, training, held_out)
    for kind, count in count_cut(training, processor).items() if jax.process_index() == 0 else ():
        samples = f"{count:,d} of {len(training):,d} samples"
        logger.warning("%s go without their %s; `moresjax data check` lists them", samples, kind)

    # Model, split into what trains and what does not, each on the mesh.
    model = build_model(config, root=workdir, mesh=mesh, allow_pickle=allow_pickle)
    graphdef, trainable, frozen = split_model(model, config.also_train)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps, trainable)
    trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    state = TrainState(zero, trainable, _place_optimizer(optimizer, trainable, mesh))
    step_fn = jitted_step(config, graphdef, optimizer, schedule, state, mesh)

    # Resume.
    identity = run_identity(config, frozen, processor, training)
    check_identity(saved_identity(workdir / "checkpoints")[1], identity, str(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:  # one process writes for all
        save_config(config, workdir / "config.json")
        if isinstance(model, MLLM):
            save_shared(model.tuning, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    checkpoints.identity = identity
    samples_seen = 0
    if restored := checkpoints.restore(state):
        state, position = restored
        iterator.set_state(position)
        # Version 0.2 did not count them.
        samples_seen = position.get("samples_seen", int(state.step) * config.batch_size)
    return _Run(
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
    )


def _loop(run: _Run) -> tuple[TrainResult, bool]:
    """Takes the steps that are left; the result, and whether the process was asked to stop."""
    config, workdir, checkpoints = run.config, run.workdir, run.checkpoints
    rows, state, first = batch_sharding(run.mesh), run.state, run.first
    done, stopped, metrics = first, False, {}
    compile_seconds, start = 0.0, time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        reports = stack.enter_context(contextlib.closing(_StepReports(run)))
        preemption = stack.enter_context(contextlib.closing(PreemptionHandler()))
        meter = reports.meter
        while done < config.steps and not stopped:
            stacked = next(run.iterator)
            ids = stacked.pop("id")
            batch = to_device_batch(stacked, run.processor, rows, run.iterator.structure)
            state, measured = run.step_fn(state, run.frozen, batch)
            done += 1
            reports.add(done, measured, ids, meter.flops(batch))
            stopped, compiled = preemption.at(done), done == first + 1
            saves = stopped or done % config.checkpoint.every == 0 or done == config.steps
            evaluates = run.evaluators.due(done) and not stopped
            # Only a state whose steps are known to be finite is saved.
            metrics |= reports.settle(0 if saves or evaluates or compiled else IN_FLIGHT)
            if compiled:
                compile_seconds, start = time.monotonic() - start, time.monotonic()
                meter.start()
            if evaluates:
                with meter.paused():
                    found = run.evaluators.measure(done, run.graphdef, state.trainable, run.frozen)
                metrics |= found
                reports.writer.write(done, found)
            if saves:
                position = {**run.iterator.get_state(), "samples_seen": reports.samples_seen}
                checkpoints.save(state, position)
                run.iterator.skip_policy.save(workdir / SKIPPED.format(jax.process_index()))
        seconds = time.monotonic() - start
    return TrainResult(done, metrics, seconds, compile_seconds), stopped


class _StepReports:
    """Waits for steps under way and reports each under its own number.

    Attributes:
      writer: Where metrics are written.
      meter: What measures throughput.
      samples_seen: Samples that the run was trained on, up to the step that was settled last.
    """

    def __init__(self, run: _Run) -> None:
        config, first = run.config, run.first
        tensorboard, speaks = run.config.tensorboard, run.speaks
        self._config, self._workdir = config, run.workdir
        self.samples_seen, self._num_samples = run.samples_seen, run.num_samples
        self.writer = MetricWriter(run.workdir, done=first, tensorboard=tensorboard, active=speaks)
        self._progress = ProgressBar(config.steps, first, config.name, active=speaks)
        kind = jax.devices()[0].device_kind
        self.meter = ThroughputMeter(config, run.state.trainable, run.frozen, kind)
        self._pending: deque[tuple[int, Mapping[str, Array], Any, float]] = deque()

    def add(self, step: int, measured: Mapping[str, Array], ids: Any, flops: float) -> None:
        """A step has been started.

        Args:
          step: The step's number.
          measured: The step's metrics, which need not be computed yet.
          ids: Ids of its samples.
          flops: Its model FLOPs.
        """
        self._pending.append((step, measured, ids, flops))

    def settle(self, in_flight: int) -> dict[str, float]:
        """Waits until no more than `in_flight` steps are under way; the newest metrics."""
        values: dict[str, float] = {}
        while len(self._pending) > in_flight:
            step, measured, ids, flops = self._pending.popleft()
            own = _finite(step, measured, ids, self._workdir)
            self.meter.add(own["tokens"], own["labels"], flops)
            self.samples_seen += int(own["samples"])
            own["samples_seen"] = self.samples_seen
            own["epoch"] = self.samples_seen / self._num_samples
            logged = step % self._config.log_every == 0 or step == self._config.steps
            if logged:
                own |= self.meter.read()
                self.writer.write(step, own)
            shown = {k: own[k] for k in ("loss", "accuracy")}
            self._progress.update(step, shown, logged=logged)
            values |= own
        return values

    def close(self) -> None:
        """Ends the progress bar and the files."""
        self._progress.close()
        self.writer.close()


def _finished(config: RunConfig, workdir: Path, resume: str) -> TrainResult | None:
    """The result of a run that has nothing left to do; refuses the directory of another one."""
    check_workdir(config, workdir, resume)
    if not (workdir / RESULT).is_file():
        return None
    result = TrainResult(**json.loads((workdir / RESULT).read_text()))
    return result if result.step >= config.steps else None


def _finite(step: int, measured: Mapping[str, Array], ids: Any, workdir: Path) -> dict[str, float]:
    """A step's metrics; a loss or gradient that is not finite ends the run."""
    metrics = {name: float(value) for name, value in measured.items()}
    if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        path = workdir / f"non_finite_step_{step}.json"
        path.write_text(
            json.dumps({"step": step, "metrics": repr(metrics), "samples": list(map(str, ids))})
        )
        raise UserError(
            f"loss {metrics['loss']} or gradient norm {metrics['grad_norm']} is not finite at step "
            f"{step}; the samples are in {path}"
        )
    return metrics


def _place_optimizer(
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
