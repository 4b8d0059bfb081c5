"""Words and samples of concepts."""

import jax.numpy as jnp
import numpy as np
import pytest

from moresjax.analysis.concepts import learn
from moresjax.analysis.grounding import (
    WordFilter,
    clip_scores,
    clip_text,
    ground_images,
    ground_text,
    random_words,
    word_overlap,
)
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.data.tokenizer import train_tokenizer
from moresjax.testing import talking_model

MODEL = talking_model()
VOCABULARY = MODEL.processor.tokenizer.get_vocab()
NORM = "llm.norm.out"


def head_column(word):
    return np.asarray(MODEL.mllm.llm.head.kernel[...])[:, VOCABULARY[word]]


def test_words_are_those_with_the_largest_logits():
    wanted = ["seven", "largest", "two"]
    vectors = np.stack([head_column(word) for word in wanted])
    found = ground_text(MODEL, vectors, words=4, candidates=37, site=NORM)
    logits = np.asarray(MODEL.mllm.llm.logits(jnp.asarray(vectors)))
    names = {number: word for word, number in VOCABULARY.items()}
    for own, row in zip(found.words, logits, strict=True):
        order = [names[number] for number in np.argsort(-row)]
        assert own == [word for word in order if word in own]
        assert set(own) <= {word for word in order if word.isalpha() and len(word) > 2}
        assert len(own) == len(set(own)) == 4
    assert found.norm == "none"
    assert found.filter["stop_words"] == "scikit-learn's English ones"


def test_the_final_norm_is_applied_to_states_of_blocks_only():
    vectors = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 9
    normed = np.asarray(MODEL.mllm.llm.norm(jnp.asarray(vectors)))
    options = {"words": 5, "candidates": 37}
    expected = ground_text(MODEL, normed, norm="raw", **options).words
    block = ground_text(MODEL, vectors, site="llm.block.out", **options)
    assert block.words == expected
    assert block.norm == "final"
    assert ground_text(MODEL, normed, site=NORM, **options).words == expected
    assert ground_text(MODEL, vectors, norm="final", **options).words == expected


def test_filters():
    vectors = np.eye(2, 16, dtype=np.float32)
    options = {"words": 99, "candidates": 37, "norm": "raw"}
    whole = ground_text(MODEL, vectors, **options).words[0]
    assert "the" not in whole
    assert "is" not in whole
    assert not ground_text(MODEL, vectors, **options | {"candidates": 0}).words[0]


def test_dictionaries_and_stop_words_are_files(tmp_path):
    vectors = np.eye(2, 16, dtype=np.float32)
    options = {"words": 99, "candidates": 37, "norm": "raw"}
    few, stop = tmp_path / "few.txt", tmp_path / "stop.txt"
    few.write_text("seven\nlargest\nwhale\n")
    stop.write_text("largest")
    found = ground_text(MODEL, vectors, word_filter=WordFilter(few), **options)
    assert set(found.words[0]) == {"seven", "largest"}
    assert found.filter["words"] == str(few)
    chosen = WordFilter(few, stop)
    assert ground_text(MODEL, vectors, word_filter=chosen, **options).words[0] == ["seven"]
    with pytest.raises(UserError, match=r"unknown list of words 'none.txt'"):
        ground_text(MODEL, vectors, word_filter=WordFilter("none.txt"), **options)


def test_pieces_inside_words_are_no_words():
    tokenizer = train_tokenizer(["a dogmatic dog runs", "the dog runs dogmatic"] * 5, 320)
    keep = WordFilter().keeper(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = {token: keep(number) for number, token in enumerate(tokens)}
    assert words["Ġdog"] == "dog"
    inside = [t for t in tokens if t.isalpha() and not t.startswith("Ġ") and len(t) > 2]
    assert inside
    assert not any(words[token] for token in inside)


def test_numbers_are_words_whatever_their_length_and_the_dictionary(tmp_path):
    tokenizer = train_tokenizer(["in 1984 we saw 7 dogs", "7 dogs of 1984"] * 5, 330)
    few = tmp_path / "few.txt"
    few.write_text("dogs")
    decoded = {n: tokenizer.decode([n]).strip() for n in range(len(tokenizer))}
    numbers = {n: text for n, text in decoded.items() if text.isdecimal()}
    assert {"7"} < set(numbers.values())
    for word_filter in (WordFilter(), WordFilter(few)):
        keep = word_filter.keeper(tokenizer)
        assert {n: keep(n) for n in numbers} == numbers
        assert {keep(n) for n, text in decoded.items() if text == "dogs"} == {"dogs"}
        assert not any(keep(n) for n, text in decoded.items() if text in ("in", "we", "of"))


def test_random_words_are_as_many_and_seeded():
    vectors = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    like = ground_text(MODEL, vectors, words=3, candidates=37, norm="raw")
    found = random_words(MODEL, like, size=16, seed=1)
    assert [len(own) for own in found] == [len(own) for own in like.words]
    assert found == random_words(MODEL, like, size=16, seed=1)
    assert found != random_words(MODEL, like, size=16, seed=2)


def test_samples_that_activate_most():
    z = np.array([[0.0, 0], [9, 9], [0, 1], [9, 8], [0, 0]], np.float32)
    index = [{"id": f"s{n}", "images": [f"{n}.jpg"], "found": n != 4} for n in range(5)]
    states = States.from_arrays({(NORM, 0): z}, index)
    d = learn(states, concepts=2)
    found = ground_images(d, states, samples=2)
    assert sorted(found.rows.tolist()) == [[0, 2], [1, 3]]
    assert found.ids[0] == [f"s{n}" for n in found.rows[0]]
    assert found.images[0] == [[f"{n}.jpg"] for n in found.rows[0]]
    # Equal activations: in the order of the samples.
    same = ground_images(d, np.repeat(z[:1], 4, axis=0), samples=3)
    assert same.rows.tolist() == [[0, 1, 2]] * 2


def test_quality():
    assert word_overlap([["a", "b"], ["b", "c"], ["d"]]) == pytest.approx(2 * 0.5 / 6)
    assert word_overlap([["a"]]) is None
    asked = []

    def scorer(texts, images):
        asked.append((texts, images))
        return np.array([[0.4, 0.1], [-0.2, 0.3], [0.0, 0.2], [1.0, 1.0]])

    active = np.array([[0.9, 0.5, 0.3, 0.1], [0.1, 0.9, 0.5, 0.3]])
    found = clip_scores([["a"], ["b"], ["c"], []], active, ["x", "y"], scorer)
    assert asked == [([clip_text(w) for w in (["a"], ["b"], ["c"], [])], ["x", "y"])]
    assert found["top1"] == pytest.approx(2.5 * (0.4 + 0.3) / 2)
    assert found["top3"] == pytest.approx(2.5 * (0.4 + 0 + 0 + 0.3 + 0.2 + 1) / 6)


def test_bad_input_is_told():
    with pytest.raises(UserError, match="norm=auto needs the site"):
        ground_text(MODEL, np.eye(2, 16))
    with pytest.raises(UserError, match="unknown norm 'rms'"):
        ground_text(MODEL, np.eye(2, 16), norm="rms")
    with pytest.raises(UserError, match="the head reads 16 features, these vectors have 8"):
        ground_text(MODEL, np.eye(2, 8), norm="raw")
