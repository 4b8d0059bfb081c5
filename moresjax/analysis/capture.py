"""Hidden states while a model answers: which query of an answer is taken, reduced on the device.

The state of a generated token is the activation at the query whose logits gave it; that of the
first one is the activation at the last token of the prompt. Source: "Analyzing fine-tuning
representation shift for multimodal LLMs steering".

Axis legend: L chosen layers, B rows, G new tokens, C candidates, Q queries, S tokens, D features,
N images.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import Ids, Tokenizer
from moresjax.tuning.base import ModelConfig
from moresjax.tuning.probes import ChosenToken, ProbeContext
from moresjax.tuning.selectors import parse_layers
from moresjax.tuning.sites import EDIT_SITES, num_layers

TAKES = ("prompt", "answer", "token", "each")
MATCHES = ("word", "first-token")
SITES = tuple(s for s in EDIT_SITES if not s.startswith("vision.") or s == "vision.block.out")
# The queries of an answer that choose a token which a word may begin with, of which the text then
# tells the one that begins the word.
CANDIDATES = 4


@dataclasses.dataclass(frozen=True)
class Take:
    """Which state of an answer is taken.

    >>> Take.parse("token(yes;no)")
    Take(kind='token', words=('yes', 'no'))

    Attributes:
      kind: `prompt`: that of the query of the first new token. `answer`: the mean over the queries
        of all new tokens but the end token. `token`: that of the query of the first token of one of
        the words, where it first occurs. `each`: those of all new tokens.
      words: The words of `token`.
    """

    kind: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({';'.join(self.words)})" if self.words else self.kind

    @classmethod
    def parse(cls, text: str, words: Sequence[str] = ()) -> "Take":
        """The take that a text names.

        Args:
          text: `prompt`, `answer`, `each`, `token(WORD;WORD)`, or `token`.
          words: The words of a bare `token`.

        Raises:
          UserError: The text names none, or there are no words.
        """
        found = re.fullmatch(r"token\((.*)\)", text)
        if found:
            kind, own = "token", tuple(w.strip() for w in found[1].split(";") if w.strip())
        else:
            kind, own = text, tuple(words) if text == "token" else ()
        if kind not in TAKES:
            raise choice_error("take", text, ("prompt", "answer", "token(WORD;WORD)", "each"))
        if kind == "token" and not own:
            raise UserError("take=token needs words, as in token(yes;no)")
        return cls(kind, own)


@dataclasses.dataclass(frozen=True)
class StateProbe:
    """Keeps a state of each answer while it is generated.

    Attributes:
      site: A site of `SITES`.
      layers: The layers of the site; None: all, and for sites without layers.
      take: A kind of `Take`.
      ids: Tokens that a word of take `token` may begin with.
      candidates: The most queries that are kept for take `token`.
    """

    at_queries: ClassVar[bool] = True
    site: str = "llm.block.out"
    layers: tuple[int, ...] | None = None
    take: str = "prompt"
    ids: tuple[int, ...] = ()
    candidates: int = 1

    @property
    def name(self) -> str:
        """The key of the states in statistics."""
        return f"{self.take} states at {self.site}"

    def read(self, context: ProbeContext, h: Float[Array, "..."]) -> Float[Array, "B D"]:
        """The activation at the query, or the mean over the tokens of a row's images."""
        if self.site.startswith(("vision.", "connector.")):
            return _image_mean(context, h, self.site)
        if context.queries is not None:
            h = jnp.take_along_axis(h, context.queries[:, :, None], axis=1)
        return h[:, 0].astype(jnp.float32)

    def fold(
        self, total: dict[str, Array] | None, new: Float[Array, "L B D"], token: ChosenToken
    ) -> dict[str, Array]:
        """The states so far, after another token.

        Returns:
          `state`, fp32: `[L, B, D]` for `prompt` and `answer` (a sum), `[L, B, C, D]` for `token`,
          `[L, B, G, D]` for `each`. `count` `[1, B]`: how many states there are, or would be with
          room for all candidates. `place` `[1, B, C]`: the new tokens that candidates are.
        """
        rows, alive = jnp.arange(new.shape[1]), token.alive
        if self.take == "prompt":
            return {"state": new, "count": _ones(new)} if total is None else total
        if self.take == "answer":
            taken = alive & ~token.ends
            new = jnp.where(taken[:, None], new, 0)
            count = taken.astype(jnp.int32)[None]
            if total is None:
                return {"state": new, "count": count}
            return {"state": total["state"] + new, "count": total["count"] + count}
        room = token.most if self.take == "each" else self.candidates
        if total is None:
            state = jnp.zeros((*new.shape[:2], room, new.shape[2]), jnp.float32)
            total = {"state": state, "count": 0 * _ones(new)}
            if self.take == "token":
                total["place"] = jnp.zeros((1, new.shape[1], room), jnp.int32)
        taken = alive
        if self.take == "token":
            taken = alive & jnp.isin(token.ids, jnp.asarray(self.ids, jnp.int32))
        column = jnp.where(taken, total["count"][0], room)  # a column that is not there is dropped
        found = {
            "state": total["state"].at[:, rows, column].set(new, mode="drop"),
            "count": total["count"] + taken[None],
        }
        if self.take == "token":
            places = total["place"].at[0, rows, column].set(token.number, mode="drop")
            found["place"] = places
        return found


def _ones(new: Float[Array, "L B D"]) -> Array:
    return jnp.ones((1, new.shape[1]), jnp.int32)


def _image_mean(context: ProbeContext, h: Float[Array, "..."], site: str) -> Float[Array, "B D"]:
    """The mean over the tokens of all images of a row; zeros without any."""
    assert context.images is not None
    rows, images = context.images.shape
    h = h.reshape(rows, images, -1, h.shape[-1]).astype(jnp.float32)
    if site.startswith("vision."):
        h = h[:, :, h.shape[2] - context.patches :]  # class token and registers come first
    there = context.images.astype(jnp.float32)
    total = jnp.einsum("bnd,bn->bd", h.mean(2), there)
    return total / jnp.maximum(there.sum(1), 1)[:, None]


@dataclasses.dataclass(frozen=True)
class OutputProbe:
    """Keeps the activations of all tokens at a site.

    Attributes:
      site: A site of `SITES`.
      layers: The layers; None: all.
    """

    site: str = "llm.block.out"
    layers: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The key of the activations in statistics."""
        return f"outputs at {self.site}"

    def read(self, context: ProbeContext, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The activations."""
        return h


def check_site(site: str, config: ModelConfig) -> None:
    """Checks that a model has a site whose states can be read.

    Raises:
      UserError: It has not.
    """
    if site not in SITES:
        raise choice_error("site", site, SITES)
    if not site.startswith("llm.") and config.vision is None:
        raise UserError(f"site {site!r} needs a vision encoder; this model has none")
    if site.startswith("vision.") and config.vision.is_pair:
        raise UserError(f"site {site!r} needs one vision encoder; this model has two")


def site_layers(
    site: str, layers: str | int | Sequence[int] | None, config: ModelConfig
) -> tuple[int, ...]:
    """The layers of a site in order; `(0,)` for a site without layers.

    Args:
      site: The site.
      layers: Numbers, a number, or a choice as methods take it (`all`, `31`, `0-3`, `4;5`); None
        stands for all.
      config: The configuration of the model.

    Raises:
      UserError: The model does not have the site, or a layer.
    """
    check_site(site, config)
    count = num_layers(site, config)
    if not count:
        return (0,)
    if layers is None or isinstance(layers, str):
        return tuple(np.flatnonzero(parse_layers(layers or "all", count)).tolist())
    chosen = sorted({layers} if isinstance(layers, int) else set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong or not chosen:
        raise UserError(f"{site} has layers 0 to {count - 1}, got {wrong or 'none'}")
    return tuple(chosen)


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[int, ...]:
    """The tokens that words may begin with: as written, in lower and upper case, after a blank.

    Raises:
      UserError: A word has no tokens.
    """
    found = set()
    for word in words:
        ids = set()
        for variant in {word, word.lower(), word.upper(), word.capitalize()}:
            for text in (variant, f" {variant}"):
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids |= set(tokens[:1]) - {tokenizer.unk_token_id}
        if not ids:
            raise UserError(f"the tokenizer has no tokens for the word {word!r}")
        found |= ids
    return tuple(sorted(found))


def begins_word(spell: Callable[[Ids], str], tokens: Ids, place: int, words: Sequence[str]) -> bool:
    """Whether one of the words begins with the token at a place of an answer, as a whole word.

    Args:
      spell: Turns tokens into text.
      tokens: The answer.
      place: The number of the token.
      words: The words; case does not matter.
    """
    before, text = spell(tokens[:place]), spell(tokens)
    rest = text[len(before) :]
    blank = rest[: len(rest) - len(rest.lstrip())]
    if before and not blank and (before[-1].isalnum() and rest[:1].isalnum()):
        return False
    rest = rest.lstrip().casefold()
    return any(re.match(rf"{re.escape(word.casefold())}(?!\w)", rest) for word in words)


@dataclasses.dataclass(frozen=True)
class AnswerState:
    """One state of an answer.

    Attributes:
      state: The state at each of the layers `[L, D]`; zeros where it was not found.
      found: Whether there is one.
      place: The number of the new token that it belongs to; 0 for `answer`.
      count: How many queries it is made of.
    """

    state: Float[np.ndarray, "L D"]
    found: bool
    place: int
    count: int


def answer_states(
    stats: Mapping[str, Any], take: Take, begins: Callable[[int], bool]
) -> list[AnswerState]:
    """The states of an answer from the statistics of its row: one, or one for each token.

    Args:
      stats: What `StateProbe` gave, without the axis of rows.
      take: What was taken.
      begins: Whether one of the words begins at a place; asked of candidates of `token`.
    """
    state, count = np.asarray(stats["state"], np.float32), int(stats["count"][0])
    if take.kind == "prompt":
        return [AnswerState(state, True, 0, 1)]
    if take.kind == "answer":
        return [AnswerState(state / max(count, 1), count > 0, 0, count)]
    if take.kind == "each":
        return [AnswerState(state[:, place], True, place, 1) for place in range(count)]
    places = stats["place"][0, :count]
    for number, place in enumerate(places.tolist()):
        if begins(place):
            return [AnswerState(state[:, number], True, place, 1)]
    return [AnswerState(np.zeros_like(state[:, 0]), False, -1, 0)]
