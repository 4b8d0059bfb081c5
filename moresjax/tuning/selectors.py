"""Selectors: strings that turn a token layout into a mask.

    image                    every visual token (of every image)
    image:f4+l5              the first 4 and the last 5 of each image; each side capped at half
    image:f4  question:l4    one side only
    question:f4+l0           one side of f4+l4: at most half; `f0+l4` is the other
    image:uniform(9)         9 evenly spaced tokens, step (n-1)//(9-1), starting at the first
    image:uniform(1%)        the same with round(1% of n) tokens, at least one
    image:25%                round(25% of n) tokens: half of them first, the rest last
    image:at(0;5;9)          by index
    question:skip(2;1)       all but the first 2 and the last token
    question:skip(2;1)+f4    the first 4 of those; any slice may follow
    question  prompt  answer  system  all     other regions; `prompt` is all that is not an answer
    dialogue                 questions and answers, but nothing that is being generated
    last_prompt              the token that predicts the first answer token
    generated                tokens that generation appends (in training: the answer)
    roi                      visual tokens, or patches of the vision encoder, in the region of
                             interest; no class token, and nothing of an image without a box
    token(cat)               every occurrence of a one-token word, with or without a space before it
    word(5)                  the fifth word of each question, counted from 1, with all its tokens
    mark(object)             the pieces of the questions that are marked `object`, all their tokens
    image|question:f4        the union of several selectors

Slices count inside one image for `image`, and inside one conversation for other regions. Questions
that share an image (branches) count as if each stood alone in a row, which holds to the last token
for regions that lie in a branch, and for `prompt` and `all` as long as no slice reaches from the
end of a question back into the tokens that questions share. Of shared tokens, slices that depend on
the number of all tokens count the longest question.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moresjax.core.errors import UserError, choice_error, shortened
from moresjax.core.layout import (
    SHARED,
    IntField,
    TokenKind,
    TokenLayout,
    last_prompt_mask,
    rank_in_conversation,
    valid_mask,
)
from moresjax.core.types import AnyArray

REGIONS = {
    "image": (TokenKind.IMAGE,),
    "system": (TokenKind.SYSTEM,),
    "question": (TokenKind.QUESTION,),
    "prompt": (TokenKind.SYSTEM, TokenKind.IMAGE, TokenKind.QUESTION),
    "answer": (TokenKind.ANSWER,),
    "dialogue": (TokenKind.QUESTION, TokenKind.ANSWER),
    "generated": (TokenKind.ANSWER,),
    "all": (TokenKind.SYSTEM, TokenKind.IMAGE, TokenKind.QUESTION, TokenKind.ANSWER),
}
SPECIAL = ("last_prompt", "roi", "token(WORD)", "word(N)", "mark(NAME)")
SLICES = ("fN", "lN", "fN+lN", "uniform(N)", "uniform(P%)", "P%", "at(I;J)", "skip(I;J)+SLICE")
_DECODED = {"answer", "generated", "all"}

_MARKED = re.compile(r"word\([1-9]\d{0,8}\)|mark\([^\s()|]+\)")
MAX_MARKS = 31  # bits of a 32-bit integer, without its sign

_DIGITS = 9  # of a number of tokens or layers: sums of two stay within 32 bits
MAX_LENGTH = 4096  # characters of a selector or of a choice of layers
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True)
class TokenSlice:
    """Which of n tokens of a run are meant; a pure function of a token's rank and of n."""

    kind: str  # all | ends | uniform | ratio | at
    first: int = 0
    last: int = 0
    halves: bool = False  # neither end reaches past the middle
    count: float = 0.0  # tokens, or a share of them when `percent`
    percent: bool = False
    indices: tuple[int, ...] = ()
    skipped: tuple[int, int] = (0, 0)  # tokens at both ends of the run that do not count

    @property
    def whole(self) -> bool:
        """Whether every token of the run is meant, however long it is."""
        return self == TokenSlice("all")

    @property
    def needs(self) -> int:
        """The smallest n for which every token that is asked for by number can exist."""
        count = 0 if self.percent else int(self.count)
        most = max(self.first, self.last, count, *(i + 1 for i in self.indices))
        return most + sum(self.skipped)

    def __call__(self, rank: Int[Array, "..."], n: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a token is meant, from its rank in its run and the length n of the run."""
        if not any(self.skipped):
            return self._chosen(rank, n)
        rank, n = rank - self.skipped[0], jnp.maximum(n - sum(self.skipped), 0)
        return (rank >= 0) & (rank < n) & self._chosen(rank, n)

    def _chosen(self, rank: Int[Array, "..."], n: Int[Array, "..."]) -> Bool[Array, "..."]:
        if self.kind == "all":
            return rank >= 0
        if self.kind == "at":
            return jnp.isin(rank, jnp.asarray(self.indices))
        if self.kind == "ends":
            half = n // 2 if self.halves else n
            return (rank < jnp.minimum(self.first, half)) | (
                rank >= n - jnp.minimum(self.last, half)
            )
        if self.percent:
            count = jnp.maximum(jnp.round(n * self.count / 100).astype(jnp.int32), 1)
        else:
            count = jnp.minimum(jnp.full_like(n, int(self.count)), jnp.maximum(n, 1))
        if self.kind == "ratio":
            first = count // 2
            return (rank < first) | (rank >= n - (count - first))
        step = jnp.maximum((n - 1) // jnp.maximum(count - 1, 1), 1)
        return (rank % step == 0) & (rank // step < count)


@dataclasses.dataclass(frozen=True)
class Selector:
    """A parsed selector. Call it on a layout to get the mask `[B, S]`."""

    text: str
    parts: tuple[tuple[str, TokenSlice], ...]

    def __str__(self) -> str:
        return self.text

    @property
    def acts_while_decoding(self) -> bool:
        """Whether any generated token can be selected; if not, the decode program is untouched."""
        return any(region in _DECODED or region.startswith("token(") for region, _ in self.parts)

    @property
    def words(self) -> tuple[str, ...]:
        """Words named by `token(WORD)`."""
        return tuple(r[len("token(") : -1] for r, _ in self.parts if r.startswith("token("))

    @property
    def marks(self) -> tuple[str, ...]:
        """What it wants to know of the texts: its `word(N)` and `mark(NAME)`."""
        return tuple(region for region, _ in self.parts if _MARKED.fullmatch(region))

    @property
    def uses_roi(self) -> bool:
        """Whether it wants to know regions of interest."""
        return any(region == "roi" for region, _ in self.parts)

    def __call__(
        self,
        layout: TokenLayout,
        tokens: IntField | None = None,
        roi: Bool[AnyArray, "B R"] | None = None,
        words: Mapping[str, Sequence[int]] | None = None,
        unfinished: bool = False,
        marked: Mapping[str, Bool[AnyArray, "B S"]] | None = None,
    ) -> Bool[Array, "B S"]:
        """Mask of the selected tokens.

        Args:
          layout: the layout of the batch.
          tokens: token ids, needed by `token(WORD)`.
          roi: for each visual token of the row (images in order, V each) whether it lies in the
            region of interest, needed by `roi`.
          words: token ids of each word named by a `token(WORD)`, one for every way to write it.
          unfinished: whether the rows are prefixes of prompts, of which more follows.
          marked: the tokens of each `word(N)` and `mark(NAME)`, see `marked_tokens`.
        """
        mask = jnp.zeros(layout.shape, bool)
        for region, part in self.parts:
            if region == "last_prompt":
                mask |= last_prompt_mask(layout, unfinished)
            else:
                mask |= _region_mask(region, part, layout, tokens, roi, words, marked)
        # Learned prompt tokens belong to no text region.
        return mask & valid_mask(layout) & (jnp.asarray(layout.document) != SHARED)


def _region_mask(
    region: str,
    part: TokenSlice,
    layout: TokenLayout,
    tokens: IntField | None,
    roi: Bool[AnyArray, "B R"] | None,
    words: Mapping[str, Sequence[int]] | None,
    marked: Mapping[str, Bool[AnyArray, "B S"]] | None,
) -> Bool[Array, "B S"]:
    if _MARKED.fullmatch(region):
        if marked is None or region not in marked:
            raise UserError(
                f"selector {region!r} needs a batch with marks, which prompts as text have and "
                "token ids have not"
            )
        return jnp.asarray(marked[region])
    if region.startswith("token("):
        word = region[len("token(") : -1]
        if tokens is None or not words or word not in words:
            raise UserError(f"selector {region!r} needs the batch's tokens and a tokenizer")
        return jnp.isin(jnp.asarray(tokens), jnp.asarray(words[word]))
    image = jnp.asarray(layout.image)
    if region == "roi":
        if roi is None:
            raise UserError(
                "selector 'roi' needs a batch with a region of interest, which samples and prompts "
                "with boxes have (roi=...)"
            )
        inside = jnp.take_along_axis(jnp.asarray(roi), jnp.maximum(image, 0), axis=1)
        return inside & (image >= 0)
    inside = jnp.isin(jnp.asarray(layout.kind), jnp.asarray(REGIONS[region]))
    if part.whole:
        return inside
    if region == "image":
        n = jnp.full_like(image, layout.visual_tokens)
        return inside & part(image % max(layout.visual_tokens, 1), n)
    before, after = rank_in_conversation(layout, inside)
    return inside & part(before, before + after + 1)


def parse_selector(text: str) -> Selector:
    """Parses a selector string.

    >>> import numpy as np
    >>> selector = parse_selector("question:f2")
    >>> selector(TokenLayout.text(np.ones((1, 4), bool))).tolist()
    [[True, True, False, False]]

    Raises:
      UserError: for an unknown region or slice; the message names the allowed ones.
    """
    _check_length(text)
    parts = []
    for piece in text.split("|"):
        region, _, sliced = piece.strip().partition(":")
        whole = re.fullmatch(r"token\(\S+\)", region) or _MARKED.fullmatch(region)
        if whole or region in ("last_prompt", "roi"):
            if sliced:
                raise UserError(f"selector {text!r}: {region!r} takes no slice, got {sliced!r}")
        elif region not in REGIONS:
            raise choice_error(f"region in selector {text!r}", region, (*REGIONS, *SPECIAL))
        parts.append((region, _parse_slice(sliced, text)))
    return Selector(text, tuple(parts))


def _parse_slice(sliced: str, text: str) -> TokenSlice:
    if not sliced:
        return TokenSlice("all")
    if m := re.fullmatch(r"skip\((\d+);(\d+)\)(?:\+(.+))?", sliced):
        rest = _parse_slice(m[3] or "", text)
        if not any(rest.skipped):
            return dataclasses.replace(rest, skipped=(_whole(m[1], text), _whole(m[2], text)))
    if m := re.fullmatch(r"(?:f(\d+))?(?:(?<=\d)\+(?=l))?(?:l(\d+))?", sliced):
        first, last = _whole(m[1] or "0", text), _whole(m[2] or "0", text)
        if not first + last:
            raise UserError(f"selector {text!r}: {sliced!r} is out of range")
        # With both ends named, neither may reach past the middle: they never overlap.
        return TokenSlice("ends", first=first, last=last, halves="+" in sliced)
    if m := re.fullmatch(rf"(uniform\()?{_NUMBER}(%?)(\))?", sliced):
        uniform, closed, percent = bool(m[1]), bool(m[4]), bool(m[3])
        _whole(m[2].partition(".")[0], text)
        count = float(m[2])
        if uniform == closed and (uniform or percent) and (percent or count.is_integer()):
            if not count > 0 or (percent and count > 100):
                raise UserError(f"selector {text!r}: {sliced!r} is out of range")
            return TokenSlice("uniform" if uniform else "ratio", count=count, percent=percent)
    if m := re.fullmatch(r"at\((\d+(?:;\d+)*)\)", sliced):
        return TokenSlice("at", indices=tuple(_whole(i, text) for i in m[1].split(";")))
    raise choice_error(f"slice in selector {text!r}", sliced, SLICES)


def mark_names(selectors: Iterable[Selector]) -> tuple[str, ...]:
    """What selectors want to know of the texts; the n-th of them is bit n of `Batch.marks`.

    >>> mark_names(map(parse_selector, ["word(5)|image", "mark(object)", "word(5)"]))
    ('mark(object)', 'word(5)')

    Raises:
      UserError: They are more than an integer has bits.
    """
    names = tuple(sorted({name for selector in selectors for name in selector.marks}))
    if len(names) > MAX_MARKS:
        raise UserError(f"selectors may name {MAX_MARKS} marks and words at most, not {len(names)}")
    return names


def marked_tokens(
    marks: IntField | None, names: Sequence[str]
) -> dict[str, Bool[Array, "B S"]] | None:
    """The tokens of each mark, from the bits of `Batch.marks`; None where a batch has none.

    Args:
      marks: The bits of every token.
      names: The marks in the order of their bits, see `mark_names`.
    """
    if marks is None:
        return None
    return {name: (jnp.asarray(marks) >> bit) % 2 == 1 for bit, name in enumerate(names)}


def parse_layers(text: str, num_layers: int) -> tuple[bool, ...]:
    """Parses a layer choice into one flag per layer.

    >>> parse_layers("0;2-", 4)
    (True, False, True, True)

    `all`, `0;2;4`, `3-7` (inclusive), `3-` (to the last), `every:3`, and `shallow`, `middle`,
    `deep`: the first half, the middle half and the last half of the layers (0-15, 8-23, 16-31 of
    32).

    Raises:
      UserError: for anything else, and for a layer the model does not have.
    """
    allowed = ("all", "0;2;4", "3-7", "3-", "every:K", "shallow", "middle", "deep")
    half, quarter = num_layers // 2, num_layers // 4
    named = {
        "all": range(num_layers),
        "shallow": range(half),
        "middle": range(quarter, quarter + half),
        "deep": range(half, num_layers),
    }
    _check_length(text)
    chosen, highest = set[int](), 0
    if text in named:
        chosen = set(named[text])
    elif m := re.fullmatch(r"every:([1-9]\d*)", text):
        chosen = set(range(0, num_layers, _whole(m[1], text)))
    elif re.fullmatch(r"\d+(-\d*)?(;\d+(-\d*)?)*", text):
        for piece in text.split(";"):
            low, dash, high = piece.partition("-")
            first = _whole(low, text)
            last = _whole(high, text) if high else max(num_layers - 1, first) if dash else first
            chosen |= set(range(first, min(last + 1, num_layers)))
            highest = max(highest, last)
    else:
        raise choice_error("layers", text, allowed)
    if highest >= num_layers:
        raise UserError(
            f"layers {text!r} name layer {highest}, but the model has layers 0-{num_layers - 1}"
        )
    if not chosen:
        raise UserError(f"layers {text!r} select none of the model's layers 0-{num_layers - 1}")
    return tuple(layer in chosen for layer in range(num_layers))


def _whole(digits: str, text: str) -> int:
    """A number of tokens or layers.

    Raises:
      UserError: It is larger than arrays of 32 bits can hold.
    """
    if len(digits) > _DIGITS:
        raise UserError(f"{shortened(text)!r} counts beyond {_DIGITS} digits")
    return int(digits)


def _check_length(text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise UserError(
            f"{shortened(text)!r} has {len(text):,d} characters; at most {MAX_LENGTH:,d} are read"
        )
