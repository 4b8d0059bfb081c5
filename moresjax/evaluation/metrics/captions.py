"""Captions against references: CIDEr-D, BLEU-1..4 and ROUGE-L of the COCO caption evaluation.

Sources: Vedantam et al. 2015 (CIDEr-D), Papineni et al. 2002, Lin 2004, and their implementation
in `tylin/coco-caption` (`pycocoevalcap`) behind its tokeniser (`ptb.py`). Scores are fractions
except CIDEr-D, which is ten times a cosine.

A *caption* is a list of tokens here; image i has one candidate and the references `references[i]`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.ptb import tokenize

ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0  # The width of CIDEr-D's length penalty, in tokens.
_BETA = 1.2  # The weight of recall in ROUGE-L.
# BLEU's guards against dividing by zero; kept because they show in very small corpora.
_SMALL, _TINY = 1e-9, 1e-15

Caption = Sequence[str]
Ngram = tuple[str, ...]
Weights = tuple[list[dict[Ngram, float]], int]  # tf-idf per order, and the length


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references an n-gram occurs.

    Attributes:
      images: The number of images.
      counts: N-gram -> the number of images.
    """

    images: int
    counts: Mapping[Ngram, int]

    def idf(self, ngram: Ngram) -> float:
        """The inverse document frequency; an n-gram nobody used counts as used once."""
        return math.log(self.images) - math.log(max(1, self.counts.get(ngram, 0)))


def _ngrams(caption: Caption, order: int) -> Counter[Ngram]:
    # The original scorers split again at every blank, so "22 3/4" counts as two words.
    words = " ".join(caption).split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def document_frequencies(references: Iterable[Sequence[Caption]]) -> DocumentFrequencies:
    """Frequencies over the images of a corpus."""
    counts, images = Counter(), 0
    for captions in references:
        images += 1
        counts.update({n for c in captions for order in ORDERS for n in _ngrams(c, order)})
    return DocumentFrequencies(images, counts)


def cider_d(
    candidates: Sequence[Caption],
    references: Sequence[Sequence[Caption]],
    frequencies: DocumentFrequencies | None = None,
) -> list[float]:
    """CIDEr-D of every image; the corpus score is their mean.

    >>> captions = [["a", "red", "kite"], ["two", "dogs", "run", "home"]]
    >>> [round(score, 2) for score in cider_d(captions, [[caption] for caption in captions])]
    [7.5, 10.0]

    Args:
      candidates: One caption per image.
      references: At least one caption per image.
      frequencies: The frequencies of another corpus; by default those of these references, for
        which a single image scores 0 because every n-gram is in all images.

    Raises:
      UserError: An image has no references or no candidate.
    """
    _check(candidates, references)
    frequencies = frequencies or document_frequencies(references)

    def weights(caption: Caption) -> Weights:
        """The tf-idf vectors per order, and the length, which is the number of bigrams."""
        counts = [_ngrams(caption, order) for order in ORDERS]
        vectors = [{n: tf * frequencies.idf(n) for n, tf in c.items()} for c in counts]
        return vectors, counts[1].total()

    def similarity(candidate: Weights, reference: Weights) -> float:
        (vectors_c, length_c), (vectors_r, length_r) = candidate, reference
        total = 0.0
        for c, r in zip(vectors_c, vectors_r, strict=True):
            # Repeating a word does not help: its weight is clipped at the reference's.
            dot = sum(min(weight, r[n]) * r[n] for n, weight in c.items() if n in r)
            norm = math.sqrt(sum(w * w for w in c.values()) * sum(w * w for w in r.values()))
            total += dot / norm if norm else 0.0
        return total / len(ORDERS) * math.exp(-((length_c - length_r) ** 2) / (2 * _SIGMA**2))

    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        mine = weights(candidate)
        scores.append(10 * sum(similarity(mine, weights(r)) for r in captions) / len(captions))
    return scores


def bleu(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> tuple[float, float, float, float]:
    """Corpus BLEU-1..4; the brevity penalty uses every image's reference of closest length.

    >>> caption = ["two", "dogs", "run", "home"]
    >>> [round(score, 3) for score in bleu([caption], [[caption]])]
    [1.0, 1.0, 1.0, 1.0]

    Args:
      candidates: One caption per image.
      references: At least one caption per image.

    Raises:
      UserError: An image has no references or no candidate.
    """
    _check(candidates, references)
    matched, guessed = [0] * len(ORDERS), [0] * len(ORDERS)
    length = reference_length = 0
    for candidate, captions in zip(candidates, references, strict=True):
        size, *_ = sizes = [_ngrams(c, 1).total() for c in (candidate, *captions)]
        length += size
        # Of two equally close lengths the shorter counts.
        reference_length += min((abs(other - size), other) for other in sizes[1:])[1]
        for i, order in enumerate(ORDERS):
            counts, most = _ngrams(candidate, order), Counter()
            for caption in captions:
                most |= _ngrams(caption, order)
            matched[i] += (counts & most).total()
            guessed[i] += counts.total()
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    product, scores = 1.0, []
    for order, hits, guesses in zip(ORDERS, matched, guessed, strict=True):
        product *= (hits + _TINY) / (guesses + _SMALL)
        scores.append(product ** (1 / order) * penalty)
    return tuple(scores)


def rouge_l(candidate: Caption, references: Sequence[Caption]) -> float:
    """ROUGE-L of one image: F of the best precision and the best recall over its references.

    >>> rouge_l(["a", "red", "kite"], [["a", "red", "kite"]])
    1.0
    """
    common = [_longest_common(candidate, reference) for reference in references]
    precision = max(common) / max(1, len(candidate))
    recall = max(n / max(1, len(r)) for n, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(a: Caption, b: Caption) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def caption_summary(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`CIDEr`, `Bleu_1` .. `Bleu_4` and `ROUGE_L` of raw captions.

    >>> captions = ["A red kite.", "Two dogs run home."]
    >>> caption_summary(captions, [[caption] for caption in captions])["ROUGE_L"]
    1.0

    Args:
      candidates: One text per image.
      references: At least one text per image.

    Raises:
      UserError: An image has no references or no candidate.
    """
    _check(candidates, references)
    ours = [tokenize(caption) for caption in candidates]
    theirs = [[tokenize(caption) for caption in captions] for captions in references]
    rouge = [rouge_l(c, r) for c, r in zip(ours, theirs, strict=True)]
    return {
        "CIDEr": sum(cider_d(ours, theirs)) / len(ours),
        **{f"Bleu_{n}": score for n, score in zip(ORDERS, bleu(ours, theirs), strict=True)},
        "ROUGE_L": sum(rouge) / len(rouge),
    }


def _check(candidates: Sequence, references: Sequence[Sequence]) -> None:
    if not candidates or len(candidates) != len(references):
        raise UserError(
            f"captions need one candidate per image, got {len(candidates)} for {len(references)}"
        )
    for number, captions in enumerate(references):
        if not captions:
            raise UserError(f"image {number} of the captions has no references")
