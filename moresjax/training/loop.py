"""Training: `train(config, workdir)` reads top to bottom."""

import dataclasses
import json
import logging
import re
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from moresjax.core.errors import UserError, choice_error
from moresjax.core.parameter_names import matches
from moresjax.data.pipeline import to_device_batch
from moresjax.runs.build import (
    build_iterator,
    build_model,
    build_processor,
    build_sources,
    located,
)
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import differences, read_config, save_config
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import batch_sharding, batch_shards, make_mesh, replicated, shard_params
from moresjax.sharding.processes import PreemptionHandler
from moresjax.training.metrics import MetricWriter, ProgressBar
from moresjax.training.monitors import Evaluators, check_monitors
from moresjax.training.objectives import get_objective
from moresjax.training.optimizer import make_optimizer
from moresjax.training.speed import ThroughputMeter
from moresjax.training.step import make_train_step, split_model

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
      step: steps done.
      metrics: those of the last step, and the last of every monitor.
      seconds: time of this process in the loop, without compilation.
      compile_seconds: time of the first step, which compiles.
    """

    step: int
    metrics: dict[str, float]
    seconds: float
    compile_seconds: float


def train(config, workdir: str | Path, *, resume: str = "auto") -> TrainResult:
    """Runs the training that `config` describes and leaves its checkpoints in `workdir`.

    Args:
      config: see `moresjax.runs.config.base_config`.
      workdir: the run's directory; relative `init` paths start there.
      resume: `auto` goes on from the newest intact checkpoint; `never` wants an empty directory.

    Raises:
      UserError: for a configuration that cannot run, or a directory of another run.
    """
    workdir, config = Path(workdir), located(config)
    if resume not in ("auto", "never"):
        raise choice_error("resume", resume, ("auto", "never"))
    get_objective(config.objective)  # an unknown name is told before anything is built
    _check_workdir(config, workdir, resume)
    if finished := _finished(config, workdir):
        return finished

    mesh = make_mesh(**config.mesh)
    check_numbers(config, batch_shards(mesh))

    # Data: before the model, whose reading takes longer than finding a mistake here.
    processor = build_processor(config, root=workdir)
    training, held_out = build_sources(config)
    iterator = build_iterator(config, processor, training)
    monitors = Evaluators(config, processor, mesh, training, held_out)
    rows = batch_sharding(mesh)

    # Model, split into what trains and what does not, each on the mesh.
    model = build_model(config, root=workdir, mesh=mesh)
    graphdef, trainable, frozen = split_model(model, config.also_train)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps, trainable)
    trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    state = TrainState(zero, trainable, _place_optimizer(optimizer, trainable, mesh))
    step_fn = jitted_step(config, graphdef, optimizer, schedule, state, mesh)

    # Resume.
    speaks = jax.process_index() == 0  # one process writes for all
    workdir.mkdir(parents=True, exist_ok=True)
    if speaks:
        save_config(config, workdir / "config.json")
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    if restored := checkpoints.restore(state):
        state, position = restored
        iterator.set_state(position)
    done = int(state.step)
    if done:
        logger.info("resuming %s at step %d", config.name, done)

    writer = MetricWriter(workdir, done=done, tensorboard=config.tensorboard, active=speaks)
    line_every = max(config.steps // 4, 1) if speaks else 0
    progress = ProgressBar(config.steps, done, config.name, line_every=line_every)
    speed = ThroughputMeter(config, trainable, frozen, jax.devices()[0].device_kind)
    pending = deque()
    metrics, compile_seconds, start = {}, 0.0, time.monotonic()
    first = done

    def settle() -> dict[str, float]:
        """Waits for the oldest step under way and reports it under its own number."""
        step, measured, ids, flops = pending.popleft()
        values = _finite(step, measured, ids, workdir)
        speed.add(values["tokens"], values["labels"], flops)
        logged = step % config.log_every == 0 or step == config.steps
        if logged:
            values |= speed.read()
            writer.write(step, values)
        progress.update(step, {k: values[k] for k in ("loss", "accuracy")} if logged else None)
        return values

    stop = PreemptionHandler()
    stopped = False
    try:
        while done < config.steps and not stopped:
            stacked = next(iterator)
            ids = stacked.pop("id")
            batch = to_device_batch(stacked, processor, rows, iterator.structure)
            state, measured = step_fn(state, frozen, batch)
            done += 1
            pending.append((done, measured, ids, speed.flops(batch)))
            stopped, compiled = stop.at(done), done == first + 1
            saves = stopped or done % config.checkpoint.every == 0 or done == config.steps
            watched = monitors.due(done) and not stopped
            # Only a state whose steps are known to be finite is saved.
            while len(pending) > (0 if saves or watched or compiled else IN_FLIGHT):
                metrics |= settle()
            if compiled:
                compile_seconds, start = time.monotonic() - start, time.monotonic()
                speed.start()
            if watched:
                with speed.paused():
                    found = monitors.measure(done, graphdef, state.trainable, frozen)
                metrics |= found
                writer.write(done, found)
            if saves:
                checkpoints.save(state, iterator.get_state())
                iterator.skip_policy.save(workdir / SKIPPED.format(jax.process_index()))
        seconds = time.monotonic() - start
    finally:
        stop.close()
        progress.close()
        writer.close()
        checkpoints.close()
    result = TrainResult(done, metrics, seconds, compile_seconds)
    if stopped:
        logger.warning("stopped at step %d, which is saved; the same command goes on", done)
        return result
    if speaks:
        (workdir / RESULT).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def jitted_step(config, graphdef, optimizer, schedule, state: TrainState, mesh: Mesh):
    """The train step of a configuration, `(state, frozen, batch) -> (state, metrics)`, which takes
    over the state's memory and leaves the new one where `state` is; arrays or their shapes."""
    step = make_train_step(
        graphdef,
        get_objective(config.objective),
        optimizer,
        schedule,
        mesh=mesh,
        seed=config.seed,
        microbatches=config.microbatches,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _finished(config, workdir: Path) -> TrainResult | None:
    """The result of a run that has nothing left to do."""
    if not (workdir / RESULT).is_file():
        return None
    result = TrainResult(**json.loads((workdir / RESULT).read_text()))
    return result if result.step >= config.steps else None


def check_numbers(config, shards: int) -> None:
    """Refuses sizes that cannot work before anything is built or written."""
    keys = ("steps", "batch_size", "microbatches", "log_every", "num_workers")
    sizes = {key: config[key] for key in keys}
    for key, value in {**sizes, "checkpoint.every": config.checkpoint.every}.items():
        if value < 1:
            raise UserError(f"config key {key} must be at least 1, got {value}")
    if config.pack_window < 0:
        raise UserError(f"config key pack_window must be at least 0, got {config.pack_window}")
    check_monitors(config)
    if config.batch_size % (shards * config.microbatches):
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {shards} parts of the mesh times "
            f"{config.microbatches} microbatches"
        )


def _check_workdir(config, workdir: Path, resume: str) -> None:
    """Refuses to mix two runs in one directory, and what is no directory."""
    if re.match(r"\w+:/", str(workdir)):  # would become a folder of that name
        raise UserError(f"workdir {workdir} is in an object store; give a folder or a mounted one")
    if not workdir.exists() or not any(workdir.iterdir()):
        return
    if resume == "never":
        raise UserError(f"workdir {workdir} is not empty and --resume is never")
    if not (workdir / "config.json").is_file():
        raise UserError(f"workdir {workdir} is not empty and holds no run to resume")
    saved = workdir / "checkpoints"
    if saved.is_dir() and not any(saved.glob("[0-9]*")):
        return  # a run that ended before its first checkpoint has nothing to mix with
    earlier = read_config(workdir / "config.json").to_dict()
    harmless = ("name", "log_every", "tensorboard", "checkpoint", "mesh", "num_workers")
    harmless += ("lmar_every", *(f"validation.{key}" for key in ("data", "every", "batches")))
    found = differences(earlier, config.to_dict())
    changed = [key for key in found if not any(matches(key, h) for h in harmless)]
    if changed:
        raise UserError(
            f"workdir {workdir} holds a run with other settings ({', '.join(changed)}); "
            "give another --workdir or the same settings"
        )


def _finite(step: int, measured: dict, ids, workdir: Path) -> dict[str, float]:
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


def _place_optimizer(optimizer, trainable, mesh):
    """Optimizer state on the mesh: moments like their parameters, the rest replicated."""
    opt_state = jax.jit(optimizer.init)(trainable)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, parameter: jax.device_put(moment, parameter.sharding),
        opt_state,
        trainable,
        transform_non_params=lambda x: jax.device_put(x, replicated(mesh)),
    )
