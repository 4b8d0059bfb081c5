"""Concept activation vectors: derivatives against small steps and the head, scores by hand."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from moresjax.analysis.sensitivity import (
    activation_vector,
    concept_sensitivity,
    shares,
    sign_test,
    significance,
)
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.inference.sensitivity import answer_gradients
from moresjax.testing.models import talking_model

IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
ASKED, IMAGES = ["is there a two ?", "how many ?"], [IMAGE, ()]
SITE = "llm.block.out"
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def model():
    return talking_model("mores:rank=2/prompt:length=2")


def test_behind_the_final_norm_the_derivative_is_the_heads(model):
    found = answer_gradients(model, ASKED, IMAGES, "llm.norm.out", answer="two", against="one")
    vocabulary = model.prompts.tokenizer.get_vocab()
    head = np.asarray(model.mllm.llm.head.dense())
    wanted = head[:, vocabulary["two"]] - head[:, vocabulary["one"]]
    assert found.shape == (1, 2, len(wanted))
    np.testing.assert_allclose(found[0], [wanted, wanted], rtol=1e-5, atol=1e-6)


def test_in_blocks_it_is_that_of_small_steps(model):
    """A step along a direction at the last prompt token, as edits of `run` make it."""
    token = model.prompts.tokenizer.get_vocab()["two"]
    found = answer_gradients(model, ASKED, IMAGES, answer="two")
    assert found.shape == (2, 2, 16)
    plain = model.run(ASKED[0], IMAGE, read=SITE)
    for layer, states in enumerate(plain.states[SITE]):
        direction, edit = RNG.standard_normal(16), np.full(states.shape, np.nan)

        def logit(step, layer=layer, direction=direction, edit=edit, states=states):
            edit[:, -1] = states[:, -1] + step * direction
            edits = {(SITE, layer): edit}
            return float(model.run(ASKED[0], IMAGE, read=SITE, edits=edits).logits[0, -1, token])

        slope = (logit(0.02) - logit(-0.02)) / 0.04
        along = float(found[layer, 0] @ direction)
        assert along == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_without_an_answer_it_is_that_of_the_likeliest_token(model):
    said = model.logits(ASKED[1])[0, -1]
    words = {number: word for word, number in model.prompts.tokenizer.get_vocab().items()}
    own = answer_gradients(model, ASKED, IMAGES)
    named = answer_gradients(model, ASKED, IMAGES, answer=words[int(said.argmax())])
    np.testing.assert_allclose(own[:, 1], named[:, 1], atol=1e-6)


def test_vectors_are_normals_towards_the_concept():
    shift, others = np.asarray([1.2, 0.0, -1.6, 0.0]), RNG.standard_normal((900, 4))
    vector, accuracy = activation_vector(RNG.standard_normal((900, 4)) + shift, others)
    assert vector @ shift / 2 > 0.98
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert accuracy == pytest.approx(0.841, abs=0.04)  # the best one: Phi(1)
    _, chance = activation_vector(others[:450], others[450:])
    assert chance == pytest.approx(0.5, abs=0.1)


def test_scores_and_tests_by_hand():
    gradients = np.asarray([[1.0, 0.0], [2.0, -1.0], [-1.0, 3.0], [0.0, 1.0]])
    vectors = np.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    scores = shares(gradients, vectors)
    assert scores.tolist() == [0.5, 0.5, 0.0]
    random = np.asarray([0.25, 0.5, 0.75])
    _, wanted = ttest_ind(scores, random, equal_var=False)
    assert significance(scores, random) == pytest.approx(wanted)
    # Only the first question rises along two of the three vectors: one of four has p 10/16.
    own = np.asarray([[1.0, 1.0], [2.0, -1.0], [-1.0, -3.0], [-1.0, 0.0]])
    assert sign_test(own, vectors) == pytest.approx(10 / 16)


def store(shift: float) -> tuple[States, list[str]]:
    labels = ["cat"] * 30 + ["rest"] * 90
    index = [{"id": str(n)} for n in range(120)]
    far = np.asarray([label == "cat" for label in labels])[:, None] * [shift, 0, 0, 0, 0, 0]
    return States.from_arrays({(SITE, 5): RNG.standard_normal((120, 6)) + far}, index), labels


def test_a_concept_that_counts_is_significant_and_others_are_not():
    rising = {(SITE, 5): np.tile(np.eye(6)[0], (12, 1)) + 0.1 * RNG.standard_normal((12, 6))}
    states, labels = store(6.0)
    one, rest = concept_sensitivity(states, labels, rising, runs=10)
    assert (one.concept, one.layer, one.states, one.score) == ("cat", 5, 30, 1.0)
    assert one.significant
    assert 0.15 < one.random < 0.85
    assert one.accuracy > 0.95
    assert rest.score < 0.1  # what is no cat lies the other way
    # Questions whose derivatives point anywhere depend on no concept.
    anyhow = {(SITE, 5): RNG.standard_normal((400, 6))}
    (one,) = concept_sensitivity(states, labels, anyhow, concepts=["cat"], runs=10)
    assert not one.significant
    # States without the concept in them make vectors like random ones.
    (one,) = concept_sensitivity(*store(0.0), rising, concepts=["cat"], runs=10)
    assert not one.significant
    assert one.accuracy < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ["dog"]}, "no state has the concept 'dog'"),
        ({"runs": 1}, "at least two"),
        ({"labels": ["cat"] * 2 + ["rest"] * 118}, "has 2 states and 118 others"),
        ({"gradients": {(SITE, 5): np.ones((2, 7))}}, "have 6 features, the model 7"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    states, labels = store(1.0)
    given = {"labels": labels, "gradients": {(SITE, 5): np.ones((2, 6))}} | options
    with pytest.raises(UserError, match=message):
        concept_sensitivity(states, **given)


def test_questions_that_have_no_derivative_are_refused(model):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"site": "connector.out"}, "choose a site of the LLM"),
        ({"against": "one"}, "against needs the answer"),
        ({"answer": "two", "against": "two"}, "begin with the same token"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            answer_gradients(model, ASKED, IMAGES, **options)
