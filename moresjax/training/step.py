"""The train step: one jitted function over the trainable part only.

The model is split structurally: `trainable` (fp32) is differentiated, updated, donated and saved;
`frozen` is an ordinary argument that nothing differentiates, donates or returns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, count_documents
from moresjax.core.parameter_names import matches, named_parameters, path_name
from moresjax.runs.run_config import RunConfig
from moresjax.runs.state import TrainState
from moresjax.sharding.mesh import use_mesh
from moresjax.training.objectives import Loss, get_objective
from moresjax.training.optimizer import Hyperparameters, optimizer_of


def split_model(
    model: nnx.Module, also_train: Sequence[str] = ()
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into its definition, the trainable part (cast to fp32) and the frozen rest.

    Trainable are the attached tuning parameters, the base parameters that a method trains in full,
    and the parameters matched by `also_train` (a path prefix such as `connector`, or a regex).

    Raises:
      UserError: when a pattern of `also_train` matches nothing, or nothing trains.
    """
    tuning = getattr(model, "tuning", None)
    patterns = list(also_train)
    if tuning is not None:
        patterns += tuning.trains
    parameters = named_parameters(model)
    names = list(parameters)
    for pattern in also_train:
        if not any(matches(name, pattern) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise UserError(
                f"also_train {pattern!r} matches no parameter; the parts are {', '.join(parts)}"
            )
    chosen = {name for name in names if any(matches(name, pattern) for pattern in patterns)}
    if not chosen:
        raise UserError("nothing to train: the tuning has no parameters and also_train is empty")
    for name, variable in parameters.items():
        if name in chosen and variable.dtype == jnp.int8:
            raise UserError(f"{name} is int8 and cannot train; leave it frozen")
    graphdef, trainable, frozen = nnx.split(model, lambda path, _: path_name(path) in chosen, ...)
    return graphdef, jax.tree.map(_as_fp32, trainable), frozen


def _count_samples(batch: Any) -> Array | int:
    """How many samples a batch holds, those of all devices."""
    if isinstance(batch, Batch):
        return count_documents(batch.layout)
    return jax.tree.leaves(batch)[0].shape[0]


def _as_fp32(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):  # of a model that is only described
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return x.astype(jnp.float32)


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Callable[..., Loss],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: Mesh | None = None,
    seed: int | PRNGKeyArray = 0,
    microbatches: int = 1,
) -> Callable:
    """`step(state, frozen, batch) -> (state, metrics)`, to be jitted with `state` donated.

    Gradients and label counts are summed over `microbatches` slices of the batch and divided once,
    so the loss is the mean over labels however the batch is cut or sharded. On a `mesh` activations
    are split by rows. `seed` is of dropout, as a number or as the key made of it.
    """

    def loss_sum(
        trainable: nnx.State, frozen: nnx.State, batch: Any, key: PRNGKeyArray
    ) -> tuple[Array, Loss]:
        with use_mesh(mesh):
            loss = objective(nnx.merge(graphdef, trainable, frozen), batch, key)
        return loss.total, loss

    def gradients(
        trainable: nnx.State, frozen: nnx.State, batch: Any, key: PRNGKeyArray
    ) -> tuple[nnx.State, Loss]:
        (_, loss), grads = jax.value_and_grad(loss_sum, has_aux=True)(trainable, frozen, batch, key)
        return grads, loss

    def accumulated(
        trainable: nnx.State, frozen: nnx.State, batch: Any, key: PRNGKeyArray
    ) -> tuple[nnx.State, Loss]:
        def slice_of(number: Array | int) -> tuple[nnx.State, Loss]:
            # Strided, so that every slice has rows of every device.
            rows = lambda x: x.reshape(-1, microbatches, *x.shape[1:])[:, number]  # noqa: E731
            own = jax.random.fold_in(key, number)
            return gradients(trainable, frozen, jax.tree.map(rows, batch), own)

        def add(total: Any, number: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, slice_of(number)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(slice_of, 0))
        return jax.lax.scan(add, zeros, jnp.arange(microbatches))[0]

    def step(state: TrainState, frozen: nnx.State, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        own = jax.random.key(seed) if isinstance(seed, int) else seed
        key = jax.random.fold_in(own, state.step)
        compute = gradients if microbatches == 1 else accumulated
        grads, loss = compute(state.trainable, frozen, batch, key)
        weight = jnp.maximum(loss.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": loss.total / weight,
            "accuracy": loss.correct / weight,
            "labels": loss.weight,
            "tokens": loss.tokens,
            "samples": _count_samples(batch),
            "grad_norm": optax.global_norm(grads),
            "lr": schedule(state.step),
        }
        trainable: Any = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def jitted_step(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
) -> Callable[..., Any]:
    """The compiled train step of a configuration, `(state, frozen, batch) -> (state, metrics)`.

    It takes over the memory of its first argument and leaves the new state where `state` is.

    Args:
      config: The run's configuration.
      graphdef: Definition of the model.
      optimizer: The optax transformation.
      schedule: The default learning rate, for the metrics.
      state: Arrays or their shapes, for their shardings.
      mesh: The devices.
    """
    step = make_train_step(
        graphdef,
        get_objective(config.objective),
        optimizer,
        schedule,
        mesh=mesh,
        seed=config.seed,
        microbatches=config.microbatches,
    )
    return compiled_step(step, state, donate=0)


def compiled_step(
    step: Callable[..., Any], state: TrainState, *, donate: int
) -> Callable[..., Any]:
    """A step, jitted: it takes over the memory of one argument and leaves a state where one is.

    Args:
      step: A function that returns a new state and metrics.
      state: Arrays or their shapes, for their shardings.
      donate: The number of the argument that is the old state.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=donate, out_shardings=(shardings, None))


def shared_step(config: RunConfig, graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[..., Any]:
    """A train step for all runs that differ in their `Hyperparameters`, data and weights only.

    `(numbers, state, frozen, batch) -> (state, metrics)`, to be jitted with `state` donated.

    Args:
      config: The configuration of one of the runs.
      graphdef: Definition of their model.
      mesh: The devices.
    """
    objective, microbatches = get_objective(config.objective), config.microbatches

    def step(
        numbers: Hyperparameters, state: TrainState, frozen: nnx.State, batch: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        optimizer, schedule = optimizer_of(numbers, config.optimizer, state.trainable)
        options = {"mesh": mesh, "seed": numbers.key, "microbatches": microbatches}
        own = make_train_step(graphdef, objective, optimizer, schedule, **options)
        return own(state, frozen, batch)

    return step
