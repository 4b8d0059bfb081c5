"""Pruning curves and the faithfulness of maps, against single passes and known orders."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import AttentionMaps
from moresjax.core.errors import UserError
from moresjax.inference.analyze import attribute_tokens, causes, faithfulness, pruning
from moresjax.inference.model import Model
from moresjax.inference.pruning import MAPS
from moresjax.testing.models import digits_processor, tiny_model

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3)).astype(np.uint8)
QUESTION, ANSWER = "how many ?", "two three"
SHARES = (0.0, 1 / 9, 4 / 9, 1.0)


@pytest.fixture(scope="module")
def model():
    """Three layers, with answers that are neither certain nor impossible."""
    mllm = tiny_model(vocab_size=37, num_layers=3)
    nnx.update(mllm, jax.tree.map(lambda x: 2 * x, nnx.state(mllm, nnx.Param)))
    return Model(mllm, digits_processor())


@pytest.fixture(scope="module")
def curves(model):
    return pruning(model, QUESTION, IMAGES[0], answer=ANSWER, shares=SHARES, batch_size=16)


def test_curves_are_effects_of_hiding_the_tokens_in_order(model, curves):
    options: dict[str, Any] = {"answer": ANSWER, "removal": "hide", "batch_size": 16}
    for number, name in enumerate(MAPS):
        order = np.argsort(-curves.scores[number])
        first = np.zeros((2, 9), bool)
        first[0, order[:1]] = first[1, order[:4]] = True
        masks = np.concatenate([~first, first])
        layers = [(2, 3)] if name == "fastv" else "all"  # FastV's first two layers see all
        found = causes(model, QUESTION, IMAGES[0], regions=masks, layers=layers, **options)
        wanted = found.value - found.effects[0]
        np.testing.assert_allclose(curves.inserted[number, 1:3], wanted[:2], atol=1e-5)
        np.testing.assert_allclose(curves.deleted[number, 1:3], wanted[2:], atol=1e-5)
        np.testing.assert_array_equal(curves.kept[number, 1:3], found.kept[0, :2])
    # All that is inserted, nothing that is deleted, and the other way round.
    np.testing.assert_allclose(curves.inserted[:, -1], curves.value, atol=1e-5)
    np.testing.assert_allclose(curves.deleted[:, 0], curves.value, atol=1e-5)
    np.testing.assert_allclose(curves.inserted[:, 0], curves.deleted[:, -1], atol=1e-5)
    assert np.ptp(curves.inserted) > 0.01


def test_maps_are_those_of_the_sister_analyses(model, curves):
    scores = dict(zip(curves.maps, curves.scores, strict=True))
    alone = causes(model, QUESTION, IMAGES[0], answer=ANSWER, removal="hide", batch_size=16)
    np.testing.assert_allclose(scores["effect"], alone.effects[0], atol=1e-5)
    tokens = attribute_tokens(model, QUESTION, IMAGES[0], answer=ANSWER)
    np.testing.assert_allclose(scores["gradient"], tokens.grids.reshape(-1), atol=1e-4)
    row = model.prompts.row(QUESTION, [IMAGES[0]])
    row, ids = model.prompts.with_answer(row, QUESTION, [IMAGES[0]], ANSWER)
    batch = model.service.batch([row.append(ids[:-1])], len(row) + 1)
    maps = np.asarray(model.mllm(batch, probes=(AttentionMaps(),)).stats["maps"])[:, 0]
    last, visual = [len(row) - 1, len(row)], np.flatnonzero(row.image >= 0)
    wanted = maps[:, last][:, :, visual]
    np.testing.assert_allclose(scores["attention"], wanted.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(scores["fastv"], wanted[1, 0], atol=1e-6)


def test_areas_and_intervals_over_questions(model, curves):
    chance = np.exp(curves.inserted / curves.num_tokens)
    widths = np.diff(SHARES)
    area = ((chance[:, 1:] + chance[:, :-1]) / 2 * widths).sum(1)
    np.testing.assert_allclose(curves.insertion, area, rtol=1e-6)
    questions = [(QUESTION, image, ANSWER) for image in IMAGES]
    found = faithfulness(model, questions, maps=("effect", "random"), shares=SHARES, batch_size=16)
    np.testing.assert_allclose(found.values[0, 0], curves.faithfulness[3], atol=1e-6)
    mean, low, high = found.interval("effect", against="random")
    differences = found.values[:, 0] - found.values[:, 1]
    assert mean == pytest.approx(differences.mean())
    assert differences.min() <= low < mean < high <= differences.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": ("saliency",)}, "unknown map 'saliency'; choose from: attention, fastv"),
        ({"maps": ()}, "pruning needs a map"),
        ({"shares": (0.0, 0.5)}, "shares must rise from 0 to 1"),
    ],
)
def test_what_cannot_be_pruned_is_told(model, options, message):
    with pytest.raises(UserError, match=message):
        pruning(model, QUESTION, IMAGES[0], answer=ANSWER, **options)
    with pytest.raises(UserError, match="faithfulness needs at least one question"):
        faithfulness(model, [])
