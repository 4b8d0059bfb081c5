"""Editors of a region and of a token: where they act, what trains, and that nothing else moves."""

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import path_name
from moresjax.data.samples import IMAGE_MARK, Mark, Sample, Turn
from moresjax.inference.model import Model
from moresjax.testing.models import digits_processor, tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.hooks import AttachedEdit
from moresjax.tuning.spec import parse_spec

QUESTION = f"{IMAGE_MARK}\nis there a three ?"
INDICATOR = Mark("indicator", 0, QUESTION.index("three"), QUESTION.index(" ?"))
CORNER = ((0.0, 0.0, 0.6, 0.3),)  # two of 3 x 3 patches
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


NO_MARK = Mark("indicator", 0, 0, 0)


def model_of(spec) -> Model:
    return Model(tiny_model(spec, vocab_size=37, num_layers=2), digits_processor())


@pytest.fixture(scope="module")
def model():
    return model_of("control:rank=2,visual_rank=3")


def sample(boxes, mark=INDICATOR, answer=None):
    return Sample("one", (Turn(QUESTION, answer),), (IMAGE,), roi=(boxes,), marks=(mark,))


def logits(model, one) -> np.ndarray:
    rows = [model.prompts.processor.row(one)]
    return np.asarray(model.service.logits(model.prompts.batch(rows, len(rows[0]))))


def parts_of(spec) -> list[tuple]:
    return [(x.site, x.positions, x.rank, x.layers) for x in parse_spec(spec)]


def test_the_groups_are_the_papers_editors():
    assert parts_of("control") == [
        ("vision.block.out", "roi", 6, "all"),
        ("connector.out", "roi", 6, "all"),
        ("llm.block.out", "mark(indicator)", 4, "0"),
    ]
    assert parts_of("control:groups=text,mark=object,rank=1") == [
        ("llm.block.out", "mark(object)", 1, "0")
    ]
    assert [site for site, *_ in parts_of("control:groups=connector;visual")] == [
        "vision.block.out",
        "connector.out",
    ]
    with pytest.raises(UserError, match="unknown group of control 'vision'; choose from: visual"):
        parse_spec("control:groups=vision")


def test_without_a_region_and_a_mark_the_model_is_the_bare_one(model):
    bare = logits(model_of("none"), sample((), NO_MARK))
    np.testing.assert_array_equal(logits(model, sample((), NO_MARK)), bare)
    by_region, by_mark = logits(model, sample(CORNER, NO_MARK)), logits(model, sample(()))
    for edited in (by_region, by_mark):
        assert np.abs(edited - bare).max() > 1e-4
    # The indicator is the last token but one: what stands before it is as it was.
    np.testing.assert_array_equal(by_mark[:, :-2], bare[:, :-2])


def test_the_whole_image_is_the_image():
    editors = (f"loreft:site={x}.out,positions=image,rank=6" for x in ("vision.block", "connector"))
    texts = ["control:groups=visual;connector", "/".join(editors)]
    by_roi, by_image = map(model_of, texts)
    nnx.update(by_image.mllm.tuning, nnx.state(by_roi.mllm.tuning))
    whole = sample(((0.0, 0.0, 1.0, 1.0),), NO_MARK)
    np.testing.assert_array_equal(logits(by_roi, whole), logits(by_image, whole))


def test_only_the_first_block_of_the_llm_has_a_gradient(model):
    mllm = model.restack()
    row = model.prompts.processor.row(sample(CORNER, answer="no"))
    batch = model.prompts.batch([row], len(row))
    graphdef, trainable, frozen = split_model(mllm, ())

    def loss(trainable):
        return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

    found = jax.jit(jax.grad(loss))(trainable)
    names = [path_name(path) for path, _ in nnx.to_flat_state(found)]
    assert all(name.startswith("tuning.params.") for name in names)
    editors = found["tuning"]["params"]
    for key, site in (("loreft", "vision.block.out"), ("loreft_3", "llm.block.out")):
        for name, variable in editors[key][site].items():
            largest = np.abs(np.asarray(variable[...])).reshape(len(variable[...]), -1).max(1)
            acts = model.mllm.tuning.layer_mask(key, site)
            assert (largest[np.asarray(acts)] > 0).all(), name
            assert (largest[~np.asarray(acts)] == 0).all(), name
    for variable in editors["loreft_2"]["connector.out"].values():
        assert np.abs(np.asarray(variable[...])).max() > 0


def test_masked_is_gathered(model):
    """Editing the tokens of a mask is taking them out, editing them, and putting them back."""
    tuning = model.mllm.tuning
    (method,) = (method for key, method in tuning.methods if key == "loreft_2")
    params = {n: x[...] for n, x in tuning.params["loreft_2"]["connector.out"].items()}
    prepared = method.prepare(params)
    rng = np.random.default_rng(1)
    h = rng.standard_normal((2, 9, 16)).astype(np.float32)
    mask = rng.random((2, 9)) < 0.4
    masked = AttachedEdit(method, prepared, mask).apply(prepared, None, h, None)
    gathered = h.copy()
    gathered[mask] += np.asarray(method.delta(prepared, h[mask][None]))[0]
    np.testing.assert_allclose(np.asarray(masked), gathered, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(masked)[~mask], h[~mask])
