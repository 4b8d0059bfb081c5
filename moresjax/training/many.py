"""Many runs at once: `train_many` trains runs that differ in numbers with one compiled program.

Every run is an ordinary one: `train` could have made its directory, and can go on with it. What
runs share is the process (imports, data sources, compiled programs, frozen weights that are equal),
and the cores, which a small step alone does not fill. Learning rates, schedules, decay of weights,
clipping and seeds are arguments of the program (`Hyperparameters`), not constants in it; layers are
masks, and smaller ranks of a method leave room in the program of the largest (`widths`). Runs that
differ in what a program is made of (method, positions, batch size) get programs of their own.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters
from moresjax.runs.data import build_sources
from moresjax.runs.run_config import AnyConfig, RunConfig
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import shard_params
from moresjax.sharding.processes import PreemptionHandler
from moresjax.training.loop import Diverged, train_prepared
from moresjax.training.optimizer import CONSTANTS, hyperparameters, optimizer_of
from moresjax.training.prepare import (
    Checked,
    Sources,
    StepFunction,
    TrainResult,
    check,
    new_state,
    prepare,
)
from moresjax.training.programs import OneCompiler
from moresjax.training.step import compiled_step, shared_step
from moresjax.training.widths import resized, shapes_of, split_widths, widen_model, with_room

logger = logging.getLogger(__name__)

DONE, DIVERGED, STOPPED = "done", "diverged", "stopped"
# The config keys that a program is made from, and some more; beside them its tuning.
_OF_PROGRAM = (
    *("model", "objective", "also_train", "dtype", "quantize", "attention", "remat", "mesh"),
    *("batch_size", "microbatches", "max_seq_len", "images_per_row", "batching", "buckets"),
    *("optimizer.b1", "optimizer.b2", "optimizer.eps"),
)
_MOST_VALUES = 4  # of a key that are named


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one of several runs ended.

    Attributes:
      state: `done`, `diverged` (a loss or gradient was not finite) or `stopped` (the process was
        asked to stop, and the run is saved).
      result: Its last step and metrics; None for a run that diverged, or never began.
      message: What was wrong with a run that diverged.
    """

    state: str
    result: TrainResult | None = None
    message: str = ""


def train_many(
    runs: Mapping[str | Path, AnyConfig | str],
    *,
    at_once: int = 0,
    resume: str = "auto",
    allow_pickle: bool = False,
    share_ranks: bool = True,
    begin: Callable[[], None] | None = None,
    report: Callable[[Path, Outcome], None] | None = None,
) -> dict[Path, Outcome]:
    """Trains several runs in one process, as many at a time as there are cores.

    One line of the log says how many programs they need, and what keeps them from sharing one. A
    run equals the one that `train` makes alone. A run that diverges ends alone. After Ctrl-C or
    SIGTERM all runs are saved, and the same call goes on with them.

    Example:
      >>> import tempfile
      >>> from moresjax.runs.config import load_config
      >>> settings = ["steps=1", "batch_size=8", "tensorboard=False"]
      >>> folder = tempfile.mkdtemp()
      >>> outcomes = train_many({
      ...     f"{folder}/{seed}": load_config("digits:stage=llm", [*settings, f"seed={seed}"])
      ...     for seed in (0, 1)
      ... })
      >>> [outcome.state for outcome in outcomes.values()]
      ['done', 'done']

    Args:
      runs: The configuration of every run, by its directory; see `train`.
      at_once: Runs that train at the same time; 0: as many as the machine has cores on a CPU, 2 on
        another device, one on several devices.
      resume: `auto` or `never`, as for `train`.
      allow_pickle: Whether pickles of base parts and adapters may be read.
      share_ranks: Whether ranks of a method share a program. Without, runs have the bits of runs
        alone; with it, a smaller rank's sums have zeros among them, which round differently.
      begin: Is called when all settings have been checked.
      report: Is called when a run has ended.

    Returns:
      How every run ended, in the order of `runs`.

    Raises:
      UserError: for a configuration that cannot run; nothing is written then. For a mistake that
        only shows later, such as weights that do not fit, the other runs are stopped and saved.
    """
    if jax.process_count() > 1:
        raise UserError("several runs at once need a single process; train them one by one")
    if at_once < 0:
        raise UserError(f"at_once must be at least 0, got {at_once}")
    shared = _Shared(share_ranks)
    starts = [check(config, place, resume, shared.sources) for place, config in runs.items()]
    shared.configs = [start.config for start in starts]
    if waiting := [start.config for start in starts if not start.finished]:
        logger.info(shared.describe_programs(waiting))
    outcomes: dict[Path, Outcome] = {}
    if begin is not None:
        begin()
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(contextlib.closing(PreemptionHandler()))
        pool = stack.enter_context(ThreadPoolExecutor(at_once or _default_at_once()))
        stack.push(lambda kind, *_: preemption.ask() if kind else None)  # before waiting for all
        futures: dict[Future[Outcome], Path] = {
            pool.submit(_train_one, start, shared, preemption, allow_pickle): start.workdir
            for start in starts
        }
        for future in as_completed(futures):
            workdir = futures[future]
            outcomes[workdir] = future.result()
            if report is not None:
                report(workdir, outcomes[workdir])
    return {start.workdir: outcomes[start.workdir] for start in starts}


def _default_at_once() -> int:
    if jax.device_count() > 1:
        return 1  # programs over several devices wait for each other and must not interleave
    return os.cpu_count() or 1 if jax.default_backend() == "cpu" else 2


def _train_one(
    start: Checked, shared: "_Shared", preemption: PreemptionHandler, allow_pickle: bool
) -> Outcome:
    """Trains one run, in a thread of its own."""
    if start.finished:
        return Outcome(DONE, start.finished)
    if preemption.asked:
        return Outcome(STOPPED)
    with shared.preparing:
        run = prepare(start, shared.make_step, allow_pickle=allow_pickle)
    try:
        result = train_prepared(run, preemption, bar=False)
    except Diverged as error:
        return Outcome(DIVERGED, message=str(error))
    return Outcome(DONE if result.step == start.config.steps else STOPPED, result)


class _Shared:
    """What the runs of a call have in common: sources, programs and equal frozen weights.

    Attributes:
      configs: The configurations of all runs.
      preparing: Is held while a run is built: libraries that are imported then, and Orbax, do not
        bear two threads.
    """

    def __init__(self, share_ranks: bool = True) -> None:
        self.configs: list[RunConfig] = []
        self._share_ranks = share_ranks
        self.preparing = threading.Lock()
        self._lock = threading.Lock()
        self._sources: dict[str, Sources] = {}
        self._programs: dict[Any, tuple[optax.GradientTransformation, OneCompiler]] = {}
        self._frozen: weakref.WeakValueDictionary[str, jax.Array] = weakref.WeakValueDictionary()

    def sources(self, config: RunConfig) -> Sources:
        """The samples of a run, which are read once for all runs that have the same."""
        wanted = config.validation
        seed = config.seed if wanted.share else 0  # which samples are held out
        key = json.dumps([config.data, wanted.data, wanted.share, seed], default=repr)
        with self._lock:
            if key not in self._sources:
                self._sources[key] = build_sources(config)
            return self._sources[key]

    def make_step(
        self,
        config: RunConfig,
        graphdef: nnx.GraphDef,
        trainable: nnx.State,
        frozen: nnx.State,
        mesh: Mesh,
    ) -> tuple[TrainState, nnx.State, StepFunction]:
        """A run's new state, its frozen parameters, and the step of its program."""
        o, length = config.optimizer, max(each.steps for each in self.configs)
        alike = self._alike(config)
        varied, constants = _varied(config, alike)
        whole = trainable  # what the program trains; more than the run does where ranks differ
        if widths := _widest(alike):
            graphdef, shapes = widen_model(graphdef, trainable, frozen, config.also_train, widths)
            whole = resized(trainable, shapes)
        numbers = hyperparameters(config, trainable, length, varied)
        key = (graphdef, mesh, constants, config.objective, config.microbatches)
        with self._lock:
            # One optimizer makes the states of all: they start as zeros, whatever the numbers.
            optimizer, program = self._programs.get(key) or (None, None)
            optimizer = optimizer or optimizer_of(numbers, o, trainable)[0]
            wide = new_state(optimizer, whole, mesh)
            if program is None:
                step = shared_step(config, graphdef, mesh)
                program = OneCompiler(compiled_step(step, wide, donate=1))
                self._programs[key] = optimizer, program
        frozen = self._known(shard_params(frozen, mesh))
        step_fn = functools.partial(program, numbers)
        if not widths:
            return wide, frozen, step_fn
        narrow = new_state(optimizer, trainable, mesh)
        return narrow, frozen, with_room(step_fn, shapes_of(narrow), shapes_of(wide))

    def _alike(self, config: RunConfig) -> list[RunConfig]:
        """The configurations whose runs may share a program with this one's."""
        return [each for each in self.configs if self._settings(each) == self._settings(config)]

    def _settings(self, config: RunConfig) -> tuple[Any, ...]:
        """The settings that a program is made from, and some more, but for layers."""
        others = repr(operator.attrgetter(*_OF_PROGRAM)(config))
        return *self._methods(config), others

    def _methods(self, config: RunConfig) -> tuple[Any, ...]:
        """What of a run's tuning a program is made from."""
        methods, widths = split_widths(config.tuning)
        return methods, () if self._share_ranks else widths

    def describe_programs(self, configs: Sequence[RunConfig]) -> str:
        """How many programs runs need, and the keys in which those of different ones differ."""
        apart = list({self._settings(config): config for config in configs}.values())
        programs, runs = (
            f"{count} {word}{'s' * (count != 1)}"
            for count, word in ((len(apart), "program"), (len(configs), "run"))
        )
        flat = [dict(_leaves(config.to_dict())) for config in apart]
        keys = [key for key in dict.fromkeys(k for one in flat for k in one) if key != "tuning"]
        if len({self._methods(config) for config in apart}) > 1:
            keys = ["tuning", *keys]
        values = {key: list(dict.fromkeys(one.get(key, "none") for one in flat)) for key in keys}
        differing = [_named(key, own) for key, own in values.items() if len(own) > 1]
        return f"{programs} for {runs}{': ' * bool(differing)}{', '.join(differing)}"

    def _known(self, frozen: nnx.State) -> nnx.State:
        """The same parameters, those that another run has, too, in that run's memory."""
        with self._lock:
            for name, variable in named_parameters(frozen).items():
                own = variable.get_value()
                other = self._frozen.setdefault(name, own)
                if other is not own and _same(own, other):
                    variable.set_value(other)
        return frozen


def _varied(config: RunConfig, alike: Sequence[RunConfig]) -> tuple[list[str], tuple]:
    """Which of `CONSTANTS` the runs of a program differ in, and the values of the others."""
    values = {
        "ratios": lambda o: (o.lr, o.lr_by_component) if o.lr_by_component else (),
        "weight_decay": lambda o: o.weight_decay,
        "clip": lambda o: o.clip,
    }
    varied = [name for name in CONSTANTS if len({values[name](a.optimizer) for a in alike}) > 1]
    o = config.optimizer
    same = (values[name](o) for name in CONSTANTS if name not in varied)
    return varied, (*varied, *same, o.b1, o.b2, o.eps)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys of a configuration that a program is made from, and their values as text."""
    if isinstance(value, Mapping):
        for name, own in value.items():
            yield from _leaves(own, f"{key}.{name}" if key else name)
    elif any(f"{key}.".startswith(f"{own}.") for own in ("tuning", *_OF_PROGRAM)):
        yield key, ";".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _named(key: str, values: Sequence[str]) -> str:
    """A key and its values, of which a few are said."""
    said = [*values[:_MOST_VALUES], *["..."] * (len(values) > _MOST_VALUES)]
    return f"{key} ({', '.join(said)})"


def _widest(alike: Sequence[RunConfig]) -> tuple[int, ...]:
    """The largest widths of the runs of a program; empty where all are the same."""
    widths = {split_widths(each.tuning)[1] for each in alike}
    return tuple(map(max, *widths)) if len(widths) > 1 else ()


def _same(one: jax.Array, other: jax.Array) -> bool:
    like = (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
    return like and bool(jnp.array_equal(one, other))
