"""How the next token is chosen from its logits.

Axis legend: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from moresjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice, with the meaning they have in `transformers`; the default is greedy.

    Attributes:
      temperature: divides the logits; 0: the most likely token is taken.
      top_k: only this many of the most likely tokens are drawn from; 0: all.
      top_p: only the most likely tokens that together have this probability; 1: all.
      repetition_penalty: of the tokens already in the row: positive logits are divided by it,
        negative ones multiplied (Keskar et al. 2019).
      seed: of rows that are given none of their own.

    Raises:
      UserError: for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not fits:
                raise UserError(f"{name} must be {allowed}, got {getattr(self, name)}")


GREEDY = Sampling()


def penalized(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits after the repetition penalty on the tokens `seen`."""
    worse = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, worse, logits)


def warped(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits to draw from: temperature, then top-k, then top-p; -inf for tokens left out.

    Tokens as likely as the last one kept are kept too.
    """
    logits = logits / sampling.temperature
    if sampling.top_k:
        best = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        kept = (mass > 1 - sampling.top_p).at[:, -1].set(True)
        least = jnp.where(kept, ascending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None,
    seeds: UInt[Array, " B"] | None,
    count: Int[Array, " B"],
) -> Int[Array, " B"]:
    """The next token of every row.

    A draw depends on the row's seed and on how many tokens it has (`count`), on nothing else.
    """
    if seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if not sampling.temperature:
        return logits.argmax(-1)

    def draw(seed, count, logits):
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.categorical(key, logits)

    return jax.vmap(draw)(seeds, count, warped(logits, sampling))
