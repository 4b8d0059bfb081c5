"""AdamW with a warmed-up schedule and a learning rate per component."""

import jax
import optax
from flax import nnx

from moresjax.core.errors import UserError, choice_error
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.core.ranges import Range
from moresjax.runs.run_config import OptimizerConfig

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
    names = list(named_parameters(trainable))
    structure = jax.tree.structure(trainable)
    ratio_tree = jax.tree.unflatten(structure, [ratios[name] for name in names])
    decays = [name.endswith((".kernel", ".table")) for name in names]
    chain = [
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.unflatten(structure, decays))
        if config.weight_decay
        else optax.identity(),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, ratio_tree)),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*chain), schedule
