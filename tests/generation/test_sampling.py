"""Sampling: the processed logits of `transformers`, and draws that follow them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moresjax.core.errors import UserError
from moresjax.generation.sampling import Sampling, choose_token, penalized, warped

ROWS, VOCAB = 6, 40
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
IDS = torch.tensor(np.random.default_rng(1).integers(0, VOCAB, (ROWS, 9)))


@pytest.mark.parametrize("top_k", [0, 1, 7, 3 * VOCAB])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 1.0])
def test_warped_logits_are_those_of_transformers(top_k, top_p):
    expected = TemperatureLogitsWarper(0.7)(IDS, torch.tensor(LOGITS))
    if top_k:
        expected = TopKLogitsWarper(top_k)(IDS, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(IDS, expected)
    found = warped(jnp.asarray(LOGITS), Sampling(temperature=0.7, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.6, 1.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    expected = RepetitionPenaltyLogitsProcessor(penalty)(IDS, torch.tensor(LOGITS))
    seen = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen, IDS.numpy(), True, axis=1)
    found = penalized(jnp.asarray(LOGITS), jnp.asarray(seen), penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_draws_follow_the_warped_distribution():
    draws, sampling = 20_000, Sampling(temperature=2.0, top_k=12)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (draws, VOCAB))
    seeds, count = jnp.arange(draws, dtype=jnp.uint32), jnp.zeros(draws, jnp.int32)
    found = np.bincount(choose_token(logits, sampling, None, seeds, count), minlength=VOCAB)
    scores = np.asarray(warped(jnp.asarray(LOGITS[:1]), sampling))[0]
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    assert (found[expected == 0] == 0).all()
    error = 5 * np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(found - draws * expected) <= error).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("temperature", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=f"^{name} must be .*, got {value}$"):
        Sampling(**{name: value})
