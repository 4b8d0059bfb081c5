"""AdamW with a warmed-up schedule and a learning rate per component."""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import UserError, choice_error
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.core.ranges import Range
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.runs.run_config import OptimizerConfig, RunConfig

# Of a single component; 0 holds it still.
LEARNING_RATE = Range(0)
SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(name: str, lr: float, steps: int, warmup: float, end: float) -> optax.Schedule:
    """Linear warmup over a share `warmup` of the steps, then decay to `end * lr` at the last step.

    Raises:
      UserError: for an unknown schedule.
    """
    warm = max(round(steps * warmup), 1) if warmup else 0
    rest = max(steps - warm, 1)
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, end),
        "linear": lambda: optax.linear_schedule(lr, end * lr, rest),
        "constant": lambda: optax.constant_schedule(lr),
    }
    if name not in decays:
        raise choice_error("schedule", name, SCHEDULES)
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warm), decays[name]()], [warm])


def learning_rate_ratios(trainable: nnx.State, lr: float, overrides: str) -> dict[str, float]:
    """Learning rate of every parameter relative to `lr`.

    Args:
      trainable: the parameters, for their names.
      lr: the default learning rate.
      overrides: `PATTERN=LR;...`; the last matching one wins.

    Raises:
      UserError: for a malformed override, or one that matches no trained parameter.
    """
    names = list(named_parameters(trainable))
    ratios = dict.fromkeys(names, 1.0)
    for override in filter(None, overrides.split(";")):
        pattern, _, text = override.rpartition("=")
        try:
            own = float(text)
        except ValueError:
            own = None
        if not pattern or own is None:
            raise UserError(f"lr_by_component {override!r} is not of the form PATTERN=LR")
        LEARNING_RATE.check(f"learning rate of {pattern!r} in lr_by_component", own)
        matched = [name for name in names if matches(name, pattern)]
        if not matched:
            parts = sorted({name.split(".")[0] for name in names})
            raise choice_error("pattern in lr_by_component", pattern, (*parts, "a path below one"))
        ratios |= dict.fromkeys(matched, own / lr)
    return ratios


def make_optimizer(
    config: OptimizerConfig, steps: int, trainable: nnx.State
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax transformation and the schedule of the default learning rate.

    Args:
      config: The optimizer's settings.
      steps: Steps of the whole run.
      trainable: The parameters, for their names.
    """
    schedule = make_schedule(config.schedule, config.lr, steps, config.warmup, config.end)
    ratios = learning_rate_ratios(trainable, config.lr, config.lr_by_component)
    values = [ratios[name] for name in named_parameters(trainable)]
    decay = config.weight_decay or None
    return _chain(config, trainable, schedule, values, config.clip or None, decay), schedule


@pytree_dataclass
class Hyperparameters:
    """The numbers of a run that a program takes as data, so that several runs share it.

    Those that are None are constants of the program. Constants give the same bits as a program of
    the run's own; as data, all but `key` and `rates` may round differently.

    Axis legend: T steps, P arrays that train.

    Attributes:
      key: The key of dropout.
      rates: The default learning rate of every step.
      ratios: The learning rate of every array relative to the default one.
      weight_decay: The decay of weights; 0 for none.
      clip: The largest norm of a gradient; infinite for any.
    """

    key: PRNGKeyArray
    rates: Float[AnyArray, " T"]
    ratios: Float[AnyArray, " P"] | None = None
    weight_decay: Float[AnyArray, ""] | None = None
    clip: Float[AnyArray, ""] | None = None


# Settings of `OptimizerConfig` that are constants of a program unless its runs differ in them.
CONSTANTS = ("ratios", "weight_decay", "clip")


def hyperparameters(
    config: RunConfig, trainable: nnx.State, length: int, varied: Collection[str] = CONSTANTS
) -> Hyperparameters:
    """The numbers of a run as data.

    Args:
      config: The run's configuration.
      trainable: The parameters, for their names.
      length: T, the run's steps or more.
      varied: Those of `CONSTANTS` that are data.
    """
    o = config.optimizer
    schedule = make_schedule(o.schedule, o.lr, config.steps, o.warmup, o.end)
    # Step by step, as a program of the run's own computes them: to the same bits.
    rates = jax.jit(lambda: jax.lax.map(schedule, jnp.arange(length)))()
    ratios = learning_rate_ratios(trainable, o.lr, o.lr_by_component)
    values = {
        "ratios": [ratios[name] for name in named_parameters(trainable)],
        "weight_decay": o.weight_decay,
        "clip": o.clip or np.inf,
    }
    data = {name: np.asarray(values[name], np.float32) for name in varied}
    return Hyperparameters(jax.random.key(config.seed), np.asarray(rates, np.float32), **data)


def optimizer_of(
    numbers: Hyperparameters, config: OptimizerConfig, trainable: nnx.State
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """What `make_optimizer` gives, from numbers that may be traced.

    Args:
      numbers: The numbers of the run.
      config: The optimizer's settings, for those numbers that are constants.
      trainable: The parameters, for their names.
    """

    def choose(number: AnyArray | None, constant: float | None) -> Array | float | None:
        return constant if number is None else jnp.asarray(number)

    rates = jnp.asarray(numbers.rates)
    own = learning_rate_ratios(trainable, config.lr, config.lr_by_component)
    ratios = [own[name] for name in named_parameters(trainable)]
    if numbers.ratios is not None:
        ratios = list(jnp.asarray(numbers.ratios))
    schedule = rates.__getitem__
    clip = choose(numbers.clip, config.clip or None)
    decay = choose(numbers.weight_decay, config.weight_decay or None)
    return _chain(config, trainable, schedule, ratios, clip, decay), schedule


def _chain(
    config: OptimizerConfig,
    trainable: nnx.State,
    schedule: optax.Schedule,
    ratios: Sequence[float | Array],
    clip: float | Array | None,
    weight_decay: float | Array | None,
) -> optax.GradientTransformation:
    """AdamW; `clip` and `weight_decay` are None for none."""
    structure = jax.tree.structure(trainable)
    ratio_tree = jax.tree.unflatten(structure, ratios)
    decays = [name.endswith((".kernel", ".table")) for name in named_parameters(trainable)]
    chain = [
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.identity()
        if weight_decay is None
        else optax.add_decayed_weights(weight_decay, mask=jax.tree.unflatten(structure, decays)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, ratio_tree)),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*chain)
