"""Caption metrics against `pycocoevalcap` and `sacrebleu`, and CIDEr-D against its formula."""

import math
import random

import numpy as np
import pytest
from sacrebleu import BLEU

from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.captions import (
    bleu,
    caption_summary,
    cider_d,
    document_frequencies,
    rouge_l,
)
from moresjax.evaluation.metrics.ptb import tokenize

CAPTIONS = [
    (
        "A brown dog runs on the beach.",
        "A dog is running on the beach.",
        "The brown dog runs along the sand, near water.",
        "A dog's day at the beach!",
    ),
    (
        "two men's hats on a table",
        "Two hats lie on a wooden table.",
        "A table with 2 hats and a scarf",
        "Hats of two men on the table",
    ),
    (
        "a clock reads 12:45 on a tower",
        "The clock on the tower says 12:45.",
        "A tall tower with a clock",
        "A tower clock that doesn't show the right time, 12:45",
    ),
    (
        "a cake a cake a cake",
        "A cake that is 22 3/4 inches wide",
        "a half-eaten cake (with candles)",
        "A cake",
    ),
    (
        "The red bus, parked on 5th Ave.",
        "A red bus is parked on 5th Ave. near a shop",
        "A double-decker bus; red.",
        "Red bus parked",
    ),
    (
        "people",
        "A group of people play frisbee in the park.",
        "Three people with a frisbee",
        "some people -- playing",
    ),
    ("A cake 22 3/4 inches wide", "A cake that is 22 3/4 inches wide", "A wide cake"),
]
CANDIDATES = [candidate for candidate, *_ in CAPTIONS]
REFERENCES = [references for _, *references in CAPTIONS]
# Of pycocoevalcap 1.2 with its Java tokeniser on these captions.
GOLDEN = {
    "CIDEr": 1.907640195571504,
    "Bleu_1": 0.7897869685558195,
    "Bleu_2": 0.6483354598523878,
    "Bleu_3": 0.46428517972384337,
    "Bleu_4": 0.30510137875992194,
    "ROUGE_L": 0.6586312817067409,
}
GOLDEN_CIDER = [
    2.2234981474574473,
    1.9490195261166954,
    1.6587913287516574,
    0.6395725738998576,
    2.809083972178674,
    0.9695822814740974,
    3.1039335391220977,
]
TOKENS = [tokenize(candidate) for candidate in CANDIDATES]
REFERENCE_TOKENS = [[tokenize(text) for text in texts] for texts in REFERENCES]


def random_corpus(seed: int, images: int = 12):
    """Candidates that differ from their first reference in one word."""
    rng = random.Random(seed)
    words = ["a", "the", "dog", "cat", "red", "blue", "runs", "sits", "on", "bench"]
    references = [
        [rng.choices(words, k=rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]
        for _ in range(images)
    ]
    candidates = [list(group[0]) for group in references]
    for candidate in candidates:
        candidate[rng.randrange(len(candidate))] = rng.choice(words)
    return candidates, references


def test_all_scores_equal_the_official_evaluation():
    assert caption_summary(CANDIDATES, REFERENCES) == pytest.approx(GOLDEN, rel=1e-12)
    assert cider_d(TOKENS, REFERENCE_TOKENS) == pytest.approx(GOLDEN_CIDER, rel=1e-12)


def test_captions_that_are_only_split_at_blanks_score_differently():
    raw = [text.split() for text in CANDIDATES]
    raw_references = [[text.split() for text in texts] for texts in REFERENCES]
    wrong = sum(cider_d(raw, raw_references)) / len(raw)
    assert abs(wrong - GOLDEN["CIDEr"]) > 0.3


def cider_by_definition(candidates, references) -> float:
    """Equations of CIDEr-D with dense vectors over all n-grams."""

    def grams(words, n):
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    scores = np.zeros(len(candidates))
    for n in (1, 2, 3, 4):
        texts = [*candidates, *(c for group in references for c in group)]
        index = {g: i for i, g in enumerate(sorted({g for t in texts for g in grams(t, n)}))}

        def counts(words, n=n, index=index):
            return np.bincount([index[g] for g in grams(words, n)], minlength=len(index) or 1)

        used = sum(
            np.any([counts(c) > 0 for c in group], axis=0).astype(int) for group in references
        )
        idf = np.log(len(references)) - np.log(np.maximum(used, 1))
        for i, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
            g_c = counts(candidate) * idf
            for reference in group:
                g_r = counts(reference) * idf
                norm = np.linalg.norm(g_c) * np.linalg.norm(g_r)
                cosine = np.minimum(g_c, g_r) @ g_r / norm if norm else 0
                gap = max(0, len(candidate) - 1) - max(0, len(reference) - 1)
                scores[i] += cosine * math.exp(-(gap**2) / 72) / len(group) / 4 * 10
    return float(scores.mean())


@pytest.mark.parametrize("seed", range(5))
def test_cider_equals_its_definition(seed):
    candidates, references = random_corpus(seed)
    found = sum(cider_d(candidates, references)) / len(candidates)
    assert found == pytest.approx(cider_by_definition(candidates, references), rel=1e-9)


def test_cider_needs_other_images_and_enough_words():
    assert cider_d([list("abcd")], [[list("abcd")]]) == [0]
    # Identical captions of 3 and 4 words: one of four n-gram orders is missing in the first.
    same = [list("abc"), list("defg")]
    assert cider_d(same, [[caption] for caption in same]) == pytest.approx([7.5, 10])


def test_document_frequencies_may_come_from_another_corpus():
    corpus = document_frequencies(REFERENCE_TOKENS)
    assert (corpus.images, corpus.counts["of",], corpus.counts["22", "3/4"]) == (7, 2, 2)
    alone = cider_d(TOKENS[:1], REFERENCE_TOKENS[:1], corpus)
    assert alone == pytest.approx(GOLDEN_CIDER[:1], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_equals_sacrebleu(seed):
    candidates, references = random_corpus(seed, images=20)
    texts = [" ".join(candidate) for candidate in candidates]
    most = max(map(len, references))
    columns = [
        [" ".join(group[k]) if k < len(group) else None for group in references]
        for k in range(most)
    ]
    for order, score in enumerate(bleu(candidates, references), start=1):
        oracle = BLEU(max_ngram_order=order, tokenize="none", smooth_method="none")
        expected = oracle.corpus_score(texts, columns).score / 100
        assert score == pytest.approx(expected, abs=1e-6)


def test_rouge_l_uses_the_best_precision_and_the_best_recall():
    # Subsequences "a c" and "b": precision 2/3 of the first reference, recall 1 of the second.
    precision, recall = 2 / 3, 1
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    found = rouge_l(["a", "b", "c"], [["a", "x", "c", "y"], ["b"]])
    assert found == pytest.approx(expected)
    assert rouge_l([], [["a"]]) == 0


def test_identical_captions_are_perfect_and_order_does_not_matter():
    perfect = caption_summary([texts[0] for texts in REFERENCES], REFERENCES)
    assert perfect["ROUGE_L"] == 1
    assert perfect["Bleu_4"] == pytest.approx(1)
    backwards = caption_summary(CANDIDATES[::-1], [texts[::-1] for texts in REFERENCES[::-1]])
    assert backwards == pytest.approx(GOLDEN)


def test_images_without_captions_are_errors():
    with pytest.raises(UserError, match="got 1 for 2"):
        caption_summary(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="image 1 of the captions has no references"):
        caption_summary(["a", "b"], [["a"], []])
