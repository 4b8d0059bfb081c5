"""What concepts mean: the words that the head reads in them, and the samples that activate them.

Axis legend: N samples, D hidden size, K concepts, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.concepts import Concepts
from moresjax.analysis.states import States
from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import AnyArray, Ids, Tokenizer
from moresjax.data.processor import Processor
from moresjax.data.word_lists import word_list
from moresjax.models.decoder import Decoder
from moresjax.models.mllm import MLLM

NORMED = "llm.norm.out"  # the site whose states the head takes as they are
NORMS = ("auto", "raw", "final")
STARTS = ("▁", "Ġ")  # what tokens that begin a word begin with, in vocabularies of subwords
SHORTEST = 3  # letters of a word


@runtime_checkable
class ReadingModel(Protocol):
    """What is needed of a `Model`: its module and its tokenizer."""

    @property
    def mllm(self) -> MLLM:
        """The module."""
        ...

    @property
    def processor(self) -> Processor | None:
        """What holds the tokenizer."""
        ...


@dataclasses.dataclass(frozen=True)
class WordFilter:
    """Which tokens are words.

    A token counts when it is a number, or has at least three letters and nothing else, is no stop
    word, and begins a word. With a dictionary it counts when it is in there instead of beginning a
    word, as in xl-vlms.

    Attributes:
      dictionary: A list or a file of the words that count; None for all.
      stop_words: A list or a file of the words that do not; None for those of scikit-learn.
    """

    dictionary: str | Path | None = None
    stop_words: str | Path | None = None

    def describe(self) -> dict[str, str]:
        """The filter, as results name it."""
        return {
            "words": str(self.dictionary or "whole alphabetic tokens"),
            "stop_words": str(self.stop_words or "scikit-learn's English ones"),
        }

    def keeper(self, tokenizer: Tokenizer) -> Callable[[int], str]:
        """A function from a token to its word in lower case, empty where it is none."""
        allowed = None if self.dictionary is None else set(word_list(self.dictionary))
        stop = _english() if self.stop_words is None else set(word_list(self.stop_words))
        inside = allowed is None and _has_starts(tokenizer)

        @functools.cache
        def word_of(token: int) -> str:
            word = tokenizer.decode([token], skip_special_tokens=True).strip().lower()
            if word.isdecimal():
                return word
            if len(word) < SHORTEST or word in stop:
                return ""
            if allowed is not None:
                return word if word in allowed else ""
            if inside and not str(tokenizer.convert_ids_to_tokens(token)).startswith(STARTS):
                return ""
            return word if word.isalpha() else ""

        return word_of


@dataclasses.dataclass(frozen=True)
class TextGrounding:
    """The words of concepts.

    Attributes:
      words: For each concept its words, the one with the largest logit first.
      norm: Whether the final norm was applied: `final` or `none`.
      filter: Which tokens counted as words, and how many candidates there were.
    """

    words: list[list[str]]
    norm: str
    filter: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self)


def ground_text(
    model: ReadingModel,
    concepts: Concepts | Float[AnyArray, "K D"],
    *,
    words: int = 10,
    candidates: int = 50,
    norm: str = "auto",
    site: str | None = None,
    word_filter: WordFilter | None = None,
) -> TextGrounding:
    """The words that a model's head reads in concepts.

    >>> from moresjax.testing import talking_model
    >>> found = ground_text(talking_model(), np.eye(2, 16), words=3, site="llm.norm.out")
    >>> [len(own) for own in found.words], found.norm
    ([3, 3], 'none')

    Args:
      model: A `Model`.
      concepts: A dictionary, or vectors `[K, D]`.
      words: At most so many words of each concept.
      candidates: They are sought among so many tokens with the largest logits.
      norm: `auto` applies the final norm unless the states are those behind it; `final` and `raw`
        do and do not apply it for any site. (xl-vlms is `raw`.)
      site: The site of the states; default: that of the dictionary.
      word_filter: Which tokens are words.

    Raises:
      UserError: The model has no tokenizer or another size, the norm is unknown, or `auto` does not
        know the site.
    """
    vectors = concepts.vectors if isinstance(concepts, Concepts) else np.asarray(concepts)
    if isinstance(concepts, Concepts):
        site = site or concepts.facts.get("site")
    logits, applied = _logits(model, vectors, norm, site)
    keep = (word_filter or WordFilter()).keeper(_tokenizer(model))
    facts = (word_filter or WordFilter()).describe() | {"candidates": candidates}
    found = [_words(row, keep, words, candidates) for row in logits]
    return TextGrounding(found, applied, facts)


def random_words(
    model: ReadingModel,
    like: TextGrounding,
    *,
    size: int,
    seed: int = 0,
    word_filter: WordFilter | None = None,
) -> list[list[str]]:
    """A baseline: as many words as each concept has, read in a random direction.

    Args:
      model: The model that read the words of `like`.
      like: The words of concepts.
      size: D.
      seed: The seed of the directions.
      word_filter: Which tokens are words.
    """
    directions = np.random.default_rng(seed).standard_normal((len(like.words), size))
    norm = "final" if like.norm == "final" else "raw"
    logits, _ = _logits(model, directions.astype(np.float32), norm, None)
    keep = (word_filter or WordFilter()).keeper(_tokenizer(model))
    lengths = map(len, like.words)
    return [_words(row, keep, n, 10 * n) for row, n in zip(logits, lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class ImageGrounding:
    """The samples that activate concepts most.

    Attributes:
      rows: For each concept the numbers of its samples `[K, n]`, the most activating first.
      ids: Their ids; empty for an array of states.
      images: The names of the images of each; empty for an array of states.
    """

    rows: Int[np.ndarray, "K n"]
    ids: list[list[str]]
    images: list[list[list[str]]]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"rows": self.rows.tolist(), "ids": self.ids, "images": self.images}


def ground_images(
    concepts: Concepts, states: States | Float[AnyArray, "N D"], samples: int = 5
) -> ImageGrounding:
    """The samples that activate each concept most; equal ones in their order.

    >>> from moresjax.analysis.concepts import learn
    >>> d = learn(np.repeat(np.eye(2), [2, 1], axis=0), concepts=2)
    >>> ground_images(d, np.eye(2), samples=1).rows.tolist()
    [[0], [1]]

    Args:
      concepts: A dictionary.
      states: An array `[N, D]`, or a store, of which the states that were found count.
      samples: How many of each concept; at most N.

    Raises:
      UserError: The states do not fit the dictionary.
    """
    order = np.argsort(-concepts.project(states), axis=0, kind="stable")[:samples].T
    rows = concepts.rows(states).numbers[order]
    if not isinstance(states, States):
        return ImageGrounding(rows, [], [])
    index = [[states.index[number] for number in own] for own in rows]
    ids = [[str(row["id"]) for row in own] for own in index]
    images = [[[str(name) for name in row.get("images") or ()] for row in own] for own in index]
    return ImageGrounding(rows, ids, images)


def word_overlap(words: Sequence[Sequence[str]]) -> float | None:
    """How much concepts share their words, mean of `|w_i n w_j| / |w_i|`; less is better.

    >>> word_overlap([["dog", "cat"], ["dog", "sun"], []])
    0.16666666666666666

    Args:
      words: The words of each concept; one without words shares none.

    Returns:
      The mean over ordered pairs of different concepts; None for a single concept.
    """
    pairs = list(itertools.permutations(words, 2))
    shares = [len(set(a) & set(b)) / len(set(a)) if a else 0.0 for a, b in pairs]
    return float(np.mean(shares)) if pairs else None


def clip_text(words: Sequence[str]) -> str:
    """The text that CLIPScore compares an image with.

    >>> clip_text(["dog", "grass"])
    'A photo is described by the words dog, grass.'
    """
    return f"A photo is described by the words {', '.join(words)}."


# Cosine similarities of texts with images `[texts, images]`; images are named as in the states.
ClipScorer = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "T N"]]


def clip_scores(
    words: Sequence[Sequence[str]],
    activations: Float[np.ndarray, "N K"],
    images: Sequence[str],
    scorer: ClipScorer,
) -> dict[str, float]:
    """CLIPScore (Hessel et al. 2021) of samples with the words of the concepts they activate most.

    >>> scorer = lambda texts, images: np.array([[0.3, -0.1], [0.1, 0.2]])
    >>> found = clip_scores([["dog"], ["sun"]], np.eye(2), ["a.jpg", "b.jpg"], scorer)
    >>> round(found["top1"], 3)
    0.625

    Args:
      words: The words of each concept.
      activations: Those of the samples.
      images: The image of each sample.
      scorer: Gives the cosine similarities of texts with images, such as those of CLIP ViT-B/32.

    Returns:
      `top1`, the mean over samples of `2.5 max(cos, 0)` with the concept that a sample activates
      most, and `top3`, with the best three (CoX-LMM).
    """
    cosine = scorer([clip_text(own) for own in words], images)
    order = np.argsort(-activations, axis=1, kind="stable")
    found = 2.5 * np.maximum(np.take_along_axis(np.asarray(cosine).T, order, axis=1), 0)
    return {"top1": float(found[:, 0].mean()), "top3": float(found[:, :3].mean())}


def _tokenizer(model: ReadingModel) -> Tokenizer:
    if model.processor is None:
        raise UserError("this model has no tokenizer, so its tokens are no words")
    return model.processor.tokenizer


def _logits(
    model: ReadingModel, vectors: Float[np.ndarray, "K D"], norm: str, site: str | None
) -> tuple[Float[np.ndarray, "K V"], str]:
    """What the head reads in vectors, and whether the final norm was applied."""
    if norm not in NORMS:
        raise choice_error("norm", norm, NORMS)
    if norm == "auto" and site is None:
        raise UserError("norm=auto needs the site of the states; give it, or norm=raw or final")
    llm, size = model.mllm.llm, model.mllm.config.llm.hidden_size
    if vectors.shape[1] != size:
        raise UserError(f"the head reads {size} features, these vectors have {vectors.shape[1]}")
    final = norm == "final" or (norm == "auto" and site != NORMED)
    logits = _read(llm, jnp.asarray(vectors, llm.config.dtype), final)
    return np.asarray(logits), "final" if final else "none"


@functools.partial(nnx.jit, static_argnames="final")
def _read(llm: Decoder, vectors: Float[Array, "K D"], final: bool) -> Float[Array, "K V"]:
    return llm.logits(llm.norm(vectors) if final else vectors)


def _words(
    logits: Float[np.ndarray, " V"], keep: Callable[[int], str], count: int, candidates: int
) -> list[str]:
    """The words of the tokens with the largest logits, each once."""
    order: Ids = np.argsort(-logits, kind="stable")[:candidates]
    words = dict.fromkeys(word for token in order if (word := keep(int(token))))
    return list(words)[:count]


@functools.cache
def _english() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


def _has_starts(tokenizer: Tokenizer) -> bool:
    """Whether tokens that begin a word are marked."""
    return any(token.startswith(STARTS) and len(token) > 1 for token in tokenizer.get_vocab())
