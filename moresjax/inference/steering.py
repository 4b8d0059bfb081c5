"""What steering a model needs of it: a tuning with one more edit, and first tokens from states.

Axis legend: N states, V vectors, D hidden size.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.core.errors import UserError
from moresjax.core.types import AnyArray
from moresjax.inference.model import Model
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.attach import Tuning, numbered
from moresjax.tuning.base import Method

CHUNK = 1 << 26  # bytes of logits at a time


@contextlib.contextmanager
def with_steering(model: Model, spec: str) -> Iterator[str]:
    """Inside, the model also has a `steer`, whose vector `Model.set` changes; then it is as before.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("mores")
    >>> with with_steering(model, "steer:positions=generated") as method:
    ...     method, model.tuning
    ('steer', 'mores/steer:positions=generated')
    >>> model.tuning
    'mores'

    Args:
      model: The model.
      spec: The spec of the `steer`, without a vector.

    Yields:
      The key of the method, for `Model.set`.
    """
    before, extra = model.mllm.tuning, Tuning(spec, model.config)
    ((key, method),) = extra.methods
    tuning, name = nnx.clone(before), key
    taken = {own for own, _ in before.methods}
    number = 2
    while name in taken:
        name, number = f"{key}_{number}", number + 1
    tuning.methods = (*tuning.methods, (name, method))
    tuning.params[name], tuning.layer_masks[name] = extra.params[key], extra.layer_masks[key]
    with _replaced(model, tuning):
        yield name


def add_steering(model: Model, spec: str) -> None:
    """Puts a `steer` on a model, after all that tunes it already.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("mores")
    >>> add_steering(model, "steer:positions=generated")
    >>> model.tuning
    'mores/steer:positions=generated'

    Args:
      model: The model.
      spec: The spec, with its vector.

    Raises:
      UserError: The spec is no `steer` or does not fit the model, its file cannot be read, or the
        model holds several adapters.
    """
    if model.adapters:
        raise UserError("a steering vector goes beside one adapter; the model holds several")
    extra = Tuning(spec, model.config)
    if any(method.name != "steer" for _, method in extra.methods):
        raise UserError(f"{spec!r} is no steer:vector=FILE.npz:KEY")
    extra.initialize()
    tuning = nnx.clone(model.mllm.tuning)
    for key, method in extra.methods:
        tuning.methods = numbered([own for _, own in (*tuning.methods, (key, method))])
        name = tuning.methods[-1][0]
        tuning.params[name], tuning.layer_masks[name] = extra.params[key], extra.layer_masks[key]
    model.mllm.tuning = tuning
    model.fit_processor()
    model.service.reset()


@contextlib.contextmanager
def kept_tuning(model: Model) -> Iterator[None]:
    """Afterwards the model has the tuning that it had, whatever was attached inside."""
    with _replaced(model, model.mllm.tuning):
        yield


@contextlib.contextmanager
def with_part(model: Model, keep: Callable[[Method], bool]) -> Iterator[None]:
    """Inside, the model has only some of the methods that tune it; then it is as before.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("mores/lora")
    >>> with with_part(model, lambda method: method.name == "lora"):
    ...     model.tuning
    'lora'
    """
    with _replaced(model, model.mllm.tuning.subset(keep)):
        yield


@contextlib.contextmanager
def _replaced(model: Model, tuning: Tuning) -> Iterator[None]:
    before, processor = model.mllm.tuning, model.processor
    try:
        if tuning is not before:
            model.mllm.tuning = tuning
            model.fit_processor()
            model.service.reset()
        yield
    finally:
        if model.mllm.tuning is not before:
            model.mllm.tuning, model.prompts.saved_processor = before, processor
            model.service.reset()


def first_tokens(
    model: Model,
    states: Float[AnyArray, "N D"],
    vectors: Float[AnyArray, "V _"],
    *,
    alpha: float = 1.0,
    site: str = "llm.block.out",
) -> Int[np.ndarray, "V N"]:
    """The first new token after each prompt for each vector, without reading a prompt again.

    An edit of the last block at the last prompt token leaves all keys and values as they were, so
    the token is the largest logit of `head(norm(h + alpha v))`.

    >>> from moresjax.testing import talking_model
    >>> first_tokens(talking_model(), np.ones((3, 16)), np.zeros((2, 16))).shape
    (2, 3)

    Args:
      model: The model that the states are of; what is attached to it before the site is in them.
      states: Its states at the query of the first new token (`take=prompt`).
      vectors: The steering vectors.
      alpha: The strength.
      site: `llm.block.out`, of the last block, or `llm.norm.out`.

    Raises:
      UserError: The site is another one, or sizes do not agree.
    """
    size = model.config.llm.hidden_size
    if site not in ("llm.block.out", "llm.norm.out"):
        raise UserError(f"first tokens follow from states of the last block, not from {site}")
    if states.shape[1] != size or vectors.shape[1] != size:
        found = f"states of {states.shape[1]} and vectors of {vectors.shape[1]} features"
        raise UserError(f"{found} for a model of {size}")
    rows = max(CHUNK // (4 * model.config.llm.vocab_size), 1)
    graphdef, state = nnx.split(model.mllm.llm)
    whole = jnp.asarray(states, jnp.float32)
    chunks = [whole[start : start + rows] for start in range(0, len(whole), rows)]
    normed = site == "llm.norm.out"
    found = []
    with use_mesh(model.mesh):
        for vector in alpha * jnp.asarray(vectors, jnp.float32):
            own = [_first_tokens(graphdef, normed, state, chunk, vector) for chunk in chunks]
            found.append(np.concatenate([np.asarray(tokens) for tokens in own]))
    return np.stack(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_tokens(
    graphdef: nnx.GraphDef,
    normed: bool,
    state: nnx.State,
    h: Float[Array, "N D"],
    moved_by: Float[Array, " D"],
) -> Int[Array, " N"]:
    llm = nnx.merge(graphdef, state)
    moved = (h + moved_by).astype(llm.config.dtype)[:, None]
    return llm.logits(moved if normed else llm.norm(moved))[:, 0].argmax(-1)
