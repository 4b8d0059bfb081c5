"""Training: `train(config, workdir)` reads top to bottom."""

import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from moresjax.core.errors import UserError
from moresjax.core.json_files import write_json
from moresjax.data.pipeline import to_device_batch
from moresjax.runs.run_config import AnyConfig
from moresjax.sharding.mesh import batch_sharding
from moresjax.sharding.processes import PreemptionHandler
from moresjax.training.clock import SaveTimer, Watchdog
from moresjax.training.metrics import MetricWriter, ProgressBar
from moresjax.training.prepare import RESULT, Run, TrainResult, check, prepare
from moresjax.training.throughput import ThroughputMeter

logger = logging.getLogger(__name__)

# Samples that could not be used, by process.
SKIPPED = "skipped_samples_{}.json"
# Steps that may be under way before their loss is looked at.
IN_FLIGHT = 2


class Diverged(UserError):
    """The loss or the gradient of a run is not finite any more."""


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
      >>> from moresjax.runs.config import load_config
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
    checked = check(config, workdir, resume)
    if checked.finished:
        return checked.finished
    run = prepare(checked, allow_pickle=allow_pickle)
    with contextlib.closing(PreemptionHandler()) as preemption:
        return train_prepared(run, preemption)


def train_prepared(run: Run, preemption: PreemptionHandler, *, bar: bool = True) -> TrainResult:
    """Takes the steps that are left of a run, or those until the process is asked to stop.

    Args:
      run: The run, which `prepare` has made.
      preemption: Knows whether the process is asked to stop.
      bar: Whether a terminal shows a bar; else a line now and then.

    Raises:
      Diverged: A loss or gradient is not finite.
    """
    if run.first:
        logger.info("resuming %s at step %d", run.config.name, run.first)
    with run.held:
        result, stopped = _loop(run, preemption, bar)
        run.checkpoints.wait()
        if stopped:
            said = "stopped at step %d, which is saved; the same command goes on"
            logger.warning(said, result.step)
        elif run.speaks:
            write_json(run.workdir / RESULT, dataclasses.asdict(result))
    return result


def _loop(run: Run, preemption: PreemptionHandler, bar: bool) -> tuple[TrainResult, bool]:
    """Takes the steps that are left; the result, and whether the process was asked to stop."""
    config, workdir, checkpoints = run.config, run.workdir, run.checkpoints
    rows, state, first = batch_sharding(run.mesh), run.state, run.first
    done, stopped, metrics = first, False, {}
    compile_seconds, start = 0.0, time.monotonic()
    timer = SaveTimer(config.checkpoint.minutes)
    with (
        contextlib.closing(Watchdog(config.watchdog, first)) as watchdog,
        contextlib.closing(_StepReports(run, bar)) as reports,
    ):
        meter = reports.meter
        while done < config.steps and not stopped:
            stacked = next(run.iterator)
            ids = stacked.pop("id")
            batch = to_device_batch(stacked, run.processor, rows, run.iterator.structure)
            state, measured = run.step_fn(state, run.frozen, batch)
            done += 1
            reports.add(done, measured, ids, meter.flops(batch))
            checkpoints.check()
            stopped, compiled = preemption.at(done), done == first + 1
            saves = timer.due(done) or stopped or done % config.checkpoint.every == 0
            saves |= done == config.steps
            evaluates = run.evaluators.due(done) and not stopped
            # Only a state whose steps are known to be finite is saved.
            metrics |= reports.settle(0 if saves or evaluates or compiled else IN_FLIGHT)
            watchdog.at(done)
            if compiled:
                compile_seconds, start = time.monotonic() - start, time.monotonic()
                meter.start()
            if evaluates:
                with meter.paused():
                    found = run.evaluators.measure(done, run.graphdef, state.trainable, run.frozen)
                metrics |= found
                reports.writer.write(done, found)
                watchdog.at(done)
            if saves:
                position = {**run.iterator.get_state(), "samples_seen": reports.samples_seen}
                checkpoints.save(state, position)
                run.iterator.skip_policy.save(workdir / SKIPPED.format(jax.process_index()))
        seconds = time.monotonic() - start
    # A run that ended right behind its last checkpoint has its metrics in the log.
    metrics = metrics or reports.writer.last
    return TrainResult(done, metrics, seconds, compile_seconds), stopped


class _StepReports:
    """Waits for steps under way and reports each under its own number.

    Attributes:
      writer: Where metrics are written.
      meter: What measures throughput.
      samples_seen: Samples that the run was trained on, up to the step that was settled last.
    """

    def __init__(self, run: Run, bar: bool) -> None:
        config, first = run.config, run.first
        tensorboard, speaks = run.config.tensorboard, run.speaks
        self._config, self._workdir = config, run.workdir
        self.samples_seen, self._num_samples = run.samples_seen, run.num_samples
        self.writer = MetricWriter(run.workdir, done=first, tensorboard=tensorboard, active=speaks)
        self._progress = ProgressBar(config.steps, first, config.name, active=speaks, bar=bar)
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


def _finite(step: int, measured: Mapping[str, Array], ids: Any, workdir: Path) -> dict[str, float]:
    """A step's metrics; a loss or gradient that is not finite ends the run."""
    metrics = {name: float(value) for name, value in measured.items()}
    if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        path = workdir / f"non_finite_step_{step}.json"
        found = {"step": step, "metrics": repr(metrics), "samples": list(map(str, ids))}
        write_json(path, found, indent=None)
        raise Diverged(
            f"loss {metrics['loss']} or gradient norm {metrics['grad_norm']} is not finite at step "
            f"{step}; the samples are in {path}"
        )
    return metrics
