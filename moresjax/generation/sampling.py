"""How the next token is chosen from its logits.

Axis legend: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from moresjax.core.errors import UserError
from moresjax.core.types import AnyArray, pytree_dataclass


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, with the settings of `transformers`; the default is greedy.

    >>> Sampling(temperature=0.7, top_p=0.9, seed=3)
    Sampling(temperature=0.7, top_k=0, top_p=0.9, repetition_penalty=None, seed=3)
    >>> Sampling(top_p=1.5)
    Traceback (most recent call last):
    moresjax.core.errors.UserError: top_p must be above 0 and at most 1, got 1.5

    Attributes:
      temperature: The logits are divided by it; 0 takes the most likely token.
      top_k: Only this many of the most likely tokens are drawn from; 0 stands for all.
      top_p: Only the most likely tokens that together have this probability are drawn from; 1
        stands for all.
      repetition_penalty: The positive logits of tokens that are in the row already are divided by
        it, the negative ones multiplied (Keskar et al. 2019); None for what the model's folder
        says, 1 where it says nothing.
      seed: The seed of rows that are given none of their own.

    Raises:
      UserError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", penalty is None or penalty > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not fits:
                raise UserError(f"{name} must be {allowed}, got {getattr(self, name)}")

    def describe(self) -> str:
        """The settings that tell answers apart, in words.

        >>> Sampling().describe(), Sampling(temperature=0.2, seed=3).describe()
        ('greedy', 'temperature 0.2, seed 3')
        """
        drawn = ("temperature", "top_k", "top_p", "seed") if self.temperature else ()
        usual = {"top_k": 0, "top_p": 1.0, "repetition_penalty": None}
        values = {name: getattr(self, name) for name in (*drawn, "repetition_penalty")}
        told = [f"{k} {x:g}" for k, x in values.items() if k not in usual or x != usual[k]]
        return ", ".join(told if self.temperature else ["greedy", *told])


GREEDY = Sampling()


@pytree_dataclass
class RowChoice:
    """Settings of `Sampling` that rows have of their own, as data: no value compiles anything.

    Attributes:
      temperature: The temperature of each row; 0 takes the most likely token.
      top_k: How many of the most likely tokens a row draws from; 0 stands for all.
      top_p: The probability that the tokens which a row draws from have together.
      listed: Whether the most likely tokens are listed beside those that a row gets.
    """

    temperature: Float[AnyArray, " B"]
    top_k: Int[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    listed: Bool[AnyArray, " B"]


def penalized(
    logits: Float[Array, "B V"], seen: Bool[AnyArray, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits after the repetition penalty on the tokens that a row has `seen`."""
    worse = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, worse, logits)


def warped(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits to draw from, after temperature, top-k and top-p; -inf for tokens that are left out.

    Tokens as likely as the last one that is kept are kept too.
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


def choose_token(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[AnyArray, "B V"] | None,
    seeds: UInt[AnyArray, " B"] | None,
    count: Int[AnyArray, " B"],
) -> Int[Array, " B"]:
    """The next token of every row.

    A draw depends on the row's seed and on how many new tokens it has, on nothing else.

    Args:
      logits: The logits of the next token.
      sampling: How it is chosen.
      seen: Tokens that each row holds, if there is a repetition penalty.
      seeds: The seed of each row, if tokens are drawn.
      count: How many new tokens each row has.
    """
    if seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty or 1.0)
    if not sampling.temperature:
        return logits.argmax(-1)
    assert seeds is not None  # whoever draws gives them

    def draw(seed: AnyArray, count: AnyArray, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.categorical(key, logits)

    return jax.vmap(draw)(seeds, count, warped(logits, sampling))


def choose_by_row(
    logits: Float[Array, "B V"],
    choice: RowChoice,
    seen: Bool[AnyArray, "B V"] | None,
    penalty: float,
    seeds: UInt[AnyArray, " B"],
    count: Int[AnyArray, " B"],
) -> Int[Array, " B"]:
    """`choose_token` where every row has its own settings; it draws the same tokens.

    Args:
      logits: The logits of the next token.
      choice: How each row's token is chosen.
      seen: Tokens that each row holds, if there is a repetition penalty.
      penalty: The repetition penalty of all rows.
      seeds: The seed of each row.
      count: How many new tokens each row has.
    """
    if seen is not None:
        logits = penalized(logits, seen, penalty)
    best = logits.argmax(-1)
    temperature = jnp.asarray(choice.temperature)[:, None]
    draws = temperature > 0

    def draw_all() -> Array:
        warm = logits / jnp.where(draws, temperature, 1.0)
        size = warm.shape[-1]
        ascending = jnp.sort(warm, axis=-1)
        top_k = jnp.asarray(choice.top_k)[:, None]
        first = jnp.where(top_k > 0, size - jnp.clip(top_k, 1, size), 0)
        least_k = jnp.take_along_axis(ascending, first, axis=-1)
        ascending = jnp.where(ascending < least_k, -jnp.inf, ascending)
        mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        top_p = jnp.asarray(choice.top_p)[:, None]
        kept = (mass > 1 - top_p).at[:, -1].set(True) | (top_p >= 1)
        least_p = jnp.where(kept, ascending, jnp.inf).min(axis=-1, keepdims=True)
        warm = jnp.where(warm < jnp.maximum(least_k, least_p), -jnp.inf, warm)

        def draw(seed: AnyArray, count: AnyArray, logits: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), logits)

        return jnp.where(draws[:, 0], jax.vmap(draw)(seeds, count, warm), best)

    return jax.lax.cond(draws.any(), draw_all, lambda: best)
