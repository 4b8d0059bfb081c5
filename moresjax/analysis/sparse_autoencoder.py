"""TopK sparse autoencoder: a state is the sum of its k strongest concepts, weighted by codes >= 0.

With `x = (z - m) / s` (mean and root mean square of the states): `f = TopK((x - c) E + b)`,
negative codes set to 0, and `x' = f W + c`, rows of `W` of norm 1. The loss is `|x - x'|^2`, and,
so that no concept stays unused, 1/32 of the same for what is left of `x` by the k strongest of the
concepts that have not been used for a while (Gao et al. 2024, arXiv 2406.04093, sections 2 and
A.2).

Axis legend: N states, S batches, B states of a batch, D hidden size, K concepts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moresjax.analysis.state_rows import StateRows
from moresjax.core.errors import UserError

AUXILIARY = 1 / 32  # weight of the loss that brings unused concepts back
REFERENCE = 2**14  # concepts, for which the learning rate is `REFERENCE_LR`
REFERENCE_LR = 2e-4

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SAEOptions:
    """The settings of a sparse autoencoder.

    Attributes:
      active: How many concepts a state has at most (k).
      epochs: How often every state is read.
      batch_size: States of a step.
      lr: Adam's learning rate, which falls to 0; default: 2e-4 at 16,384 concepts, and with the
        root of their number, at most 0.01.
      unused_after: A concept counts as unused after so many steps.

    Raises:
      UserError: A number is not above 0.
    """

    active: int = 4
    epochs: int = 50
    batch_size: int = 256
    lr: float | None = None
    unused_after: int = 20

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise UserError(f"{name} of a sparse autoencoder must be above 0, got {value}")


def train_autoencoder(
    rows: StateRows, concepts: int, seed: int, options: SAEOptions
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Trains a sparse autoencoder on states that are read in pieces, on all devices.

    Args:
      rows: The states.
      concepts: K.
      seed: The seed of the first parameters and of the order of states.
      options: The settings.

    Returns:
      The concepts `[K, D]`, and what `codes` needs beside them: `center` `[D]`, `encoder` `[D, K]`,
      `bias` `[K]` and `active`, all for states as they are.

    Raises:
      UserError: More concepts are to be active than there are, or a state is not finite.
    """
    if options.active > concepts:
        raise UserError(f"{options.active} active concepts of {concepts}; active is at most that")
    mean, variance = rows.moments()
    scale = float(np.sqrt(variance.mean())) or 1.0
    devices = jax.local_devices()
    mesh = Mesh(np.asarray(devices), ("rows",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "rows"))
    batch = -(-min(options.batch_size, len(rows)) // len(devices)) * len(devices)
    sizes = [min(rows.chunk_rows, len(rows) - i) for i in range(0, len(rows), rows.chunk_rows)]
    count = options.epochs * sum(-(-size // batch) for size in sizes)
    lr = options.lr or min(REFERENCE_LR * (REFERENCE / concepts) ** 0.5, 0.01)
    optimizer, steps = _training(lr, count, options.active, options.unused_after)
    rng = np.random.default_rng(seed)
    params = _first_params(rows, concepts, rng, mean, scale)
    carry = params, optimizer.init(params), jnp.zeros(concepts, jnp.int32)
    carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))
    for _ in range(options.epochs):
        for batches, weights in _batches(rows, batch, rng):
            given = (batches - mean) / np.float32(scale), weights
            jax.block_until_ready(carry)  # a piece is read while the last one is computed
            carry = steps(carry, *jax.device_put(given, sharding))
    params = carry[0]
    found = {name: np.asarray(value) for name, value in params.items()}
    extra = {
        "center": mean + scale * found["center"],
        "encoder": found["encoder"] / scale,
        "bias": found["bias"],
        "active": np.asarray(options.active),
    }
    return scale * found["decoder"], extra


def codes(
    z: Float[np.ndarray, "N D"],
    center: Float[np.ndarray, " D"],
    encoder: Float[np.ndarray, "D K"],
    bias: Float[np.ndarray, " K"],
    active: int,
) -> Float[np.ndarray, "N K"]:
    """The codes of states: at most `active` of each are not 0.

    Args:
      z: The states.
      center: What is subtracted from them.
      encoder: The encoder.
      bias: Its bias.
      active: k.
    """
    before = (z - center) @ encoder + bias
    return np.asarray(_top(jnp.asarray(before, jnp.float32), active))


def _batches(
    rows: StateRows, batch: int, rng: np.random.Generator
) -> Iterator[tuple[Float[np.ndarray, "S B D"], Float[np.ndarray, "S B"]]]:
    """The batches of each piece, in an order drawn within it; places that are filled weigh 0."""
    for chunk in rows.chunks():
        count = -(-len(chunk) // batch)
        places = np.resize(rng.permutation(len(chunk)), (count, batch))
        weights = (np.arange(count * batch) < len(chunk)).astype(np.float32)
        yield chunk[places], weights.reshape(count, batch)


def _first_params(
    rows: StateRows, concepts: int, rng: np.random.Generator, mean: np.ndarray, scale: float
) -> Params:
    """Concepts in the directions of drawn states, and an encoder that is their transpose."""
    chosen = np.sort(rng.choice(len(rows), concepts, replace=False))
    decoder = (rows.take(chosen) - mean) / scale
    decoder += 1e-2 * rng.standard_normal(decoder.shape)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    params = {
        "decoder": decoder,
        "encoder": decoder.T,
        "bias": np.zeros(concepts),
        "center": np.zeros(rows.size),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def _top(before: Float[Array, "B K"], active: int) -> Float[Array, "B K"]:
    """The `active` largest values of each row where they are above 0, other places 0."""
    values, places = jax.lax.top_k(before, active)
    rows = jnp.arange(len(before))[:, None]
    return jnp.zeros_like(before).at[rows, places].set(jnp.maximum(values, 0))


Carry = tuple[Params, optax.OptState, Array]


@functools.lru_cache(maxsize=8)
def _training(
    lr: float, steps: int, active: int, unused_after: int
) -> tuple[optax.GradientTransformation, Callable[[Carry, Array, Array], Carry]]:
    """Adam, and a compiled function that takes a step with each of several batches.

    It takes and returns parameters, Adam's state and the steps since each concept was last used; it
    also takes the batches and their weights.
    """
    optimizer = optax.adam(optax.linear_schedule(lr, 0.0, steps))

    def loss(params: Params, x: Array, weight: Array, unused: Array) -> tuple[Array, Array]:
        before = (x - params["center"]) @ params["encoder"] + params["bias"]
        code = _top(before, active)
        left = x - (code @ params["decoder"] + params["center"])
        count = weight.sum() * x.shape[1]
        error = (jnp.square(left) * weight[:, None]).sum() / count
        asleep = jnp.where(unused > unused_after, before, -jnp.inf)
        guess = _top(asleep, active) @ params["decoder"]
        rest = jnp.square(jax.lax.stop_gradient(left) - guess) * weight[:, None]
        any_asleep = (unused > unused_after).any()
        extra = jnp.where(any_asleep, rest.sum() / count, 0.0)
        used = ((code > 0) & (weight[:, None] > 0)).any(0)
        return error + AUXILIARY * extra, used

    def step(carry: Carry, given: tuple[Array, Array]) -> tuple[Carry, None]:
        params, state, unused = carry
        gradient, used = jax.grad(loss, has_aux=True)(params, *given, unused)
        updates: Any
        updates, state = optimizer.update(gradient, state)
        fresh = {name: value + updates[name] for name, value in params.items()}
        norms = jnp.linalg.norm(fresh["decoder"], axis=1, keepdims=True)
        fresh["decoder"] = fresh["decoder"] / jnp.maximum(norms, 1e-8)
        return (fresh, state, jnp.where(used, 0, unused + 1)), None

    @functools.partial(jax.jit, donate_argnums=0)
    def all_steps(carry: Carry, batches: Array, weights: Array) -> Carry:
        return jax.lax.scan(step, carry, (batches, weights))[0]

    return optimizer, all_steps
