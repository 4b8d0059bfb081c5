"""Regions of interest and marks in a forward pass: what they mean at every site."""

# Parameters of modules that a type checker cannot see.
# pyright: reportOptionalMemberAccess=false

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.models.connector import feature_tokens
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import TINY_VISION, randomised_tuning, tiny_config, tiny_model
from moresjax.tuning.hooks import AttachedEdit
from moresjax.tuning.masks import patch_tokens
from moresjax.tuning.selectors import mark_names, marked_tokens, parse_selector

# At vision blocks, after the connector and inside the LLM.
SPEC = "/".join(
    f"loreft:site={site},rank=2,positions={{}}"
    for site in ("vision.block.out", "connector.out", "llm.block.out")
)
BATCH = tiny_batch(rows=2, images=2)


_hidden = jax.jit(
    lambda graphdef, params, batch: nnx.merge(graphdef, params)(batch).hidden, static_argnums=0
)


@pytest.fixture(scope="module")
def hidden():
    """The hidden states of a model whose edits act on `positions`, all of one set of weights."""
    known = {}

    def run(positions, **changes):
        if positions not in known:
            known[positions] = nnx.split(
                randomised_tuning(tiny_model(SPEC.replace("{}", positions)))
            )
        return np.asarray(_hidden(*known[positions], dataclasses.replace(BATCH, **changes)))

    return run


def test_everywhere_is_image_and_nowhere_is_the_base(hidden):
    everywhere, nowhere = np.ones((2, 18), bool), np.zeros((2, 18), bool)
    found = hidden("roi", roi=everywhere)
    np.testing.assert_array_equal(found, hidden("image"))
    base = nnx.split(tiny_model())
    plain = np.asarray(_hidden(*base, BATCH))
    np.testing.assert_array_equal(hidden("roi", roi=nowhere), plain)
    assert np.abs(found - plain).max() > 0.01
    # One image's region is that of `image` there, and the other image's row is the base's.
    first = everywhere & (np.arange(2) == 0)[:, None]
    mixed = hidden("roi", roi=first)
    np.testing.assert_array_equal(mixed[0], found[0])
    np.testing.assert_array_equal(mixed[1], plain[1])


def masks_of(spec, batch, config=None, **options):
    """What each edit of a spec changes, by site, from the hooks of a forward pass."""
    tuning = MLLM(config or tiny_config(), spec).tuning
    tuning.initialize()
    hooks = tuning.hooks(batch, **options)
    edits = (pair for pair in hooks._items if isinstance(pair[1], AttachedEdit))
    return {site: np.asarray(item.mask) for site, item in edits}


def test_the_mask_of_each_site_has_the_tokens_in_the_region():
    rng = np.random.default_rng(0)
    roi = rng.random((2, 18)) < 0.4
    found = masks_of(SPEC.replace("{}", "roi"), dataclasses.replace(BATCH, roi=roi))
    np.testing.assert_array_equal(found["vision.block.out"], roi.reshape(4, 9))
    np.testing.assert_array_equal(found["connector.out"], roi)
    image = np.asarray(BATCH.layout.image)
    inside = np.take_along_axis(roi, np.maximum(image, 0), axis=1) & (image >= 0)
    np.testing.assert_array_equal(found["llm.block.out"], inside)


def test_patches_of_the_encoder_follow_their_visual_tokens():
    """The class token and registers are outside, and so is a patch that becomes no token."""
    vision = VisionConfig(**TINY_VISION, class_token=True, registers=2)
    config = MLLMConfig(llm=tiny_config().llm, vision=vision)
    roi = np.arange(18)[None] % 2 == np.arange(2)[:, None]
    found = masks_of(
        "vpt:length=2/" + SPEC.replace("{}", "roi"), dataclasses.replace(BATCH, roi=roi), config
    )
    # Two learned tokens, the class token and two registers, then the patches.
    assert not found["vision.block.out"][:, :5].any()
    np.testing.assert_array_equal(found["vision.block.out"][:, 5:], roi.reshape(4, 9))
    assert patch_tokens(vision, np.arange(9)).tolist() == list(range(9))
    joined = feature_tokens("concat3-linear", 9)
    assert patch_tokens(vision, joined).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    dropped = dataclasses.replace(vision, class_token=False, drop_first_token=True)
    assert patch_tokens(dropped, np.arange(8)).tolist() == list(range(-1, 8))
    kept = dataclasses.replace(vision, select="cls_patch")
    assert patch_tokens(kept, np.arange(10)).tolist() == list(range(1, 10))


def test_marks_are_bits_and_nothing_generated_is_marked():
    marks = np.zeros(BATCH.tokens.shape, np.int32)
    marks[0, 20], marks[0, 21], marks[1, 22] = 1, 3, 2
    batch = dataclasses.replace(BATCH, marks=marks)
    spec = "prompt:length=2/loreft:positions=word(2)|mark(a)|answer,rank=1"
    found = masks_of(spec, batch)["llm.block.out"]
    answer = np.asarray(parse_selector("answer")(BATCH.layout))
    np.testing.assert_array_equal(found[:, 2:], (marks > 0) | answer)
    names = mark_names([parse_selector("word(2)|mark(a)")])
    assert names == ("mark(a)", "word(2)")
    by_name = marked_tokens(marks, names)
    assert [np.argwhere(x).tolist() for x in by_name.values()] == [
        [[0, 20], [0, 21]],
        [[0, 21], [1, 22]],
    ]
    # While decoding there are neither marks nor regions, and nothing has to be given.
    step = jax.tree.map(lambda x: x[:, -1:], (BATCH.tokens, BATCH.layout))
    later = type(BATCH)(*step)
    spec = "loreft:positions=word(2)|roi|all:f1|generated,rank=1"
    assert masks_of(spec, later, decoding=True)["llm.block.out"].shape == (2, 1)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("roi", "selector 'roi' needs a batch with a region of interest"),
        ("mark(a)", r"selector 'mark\(a\)' needs a batch with marks"),
        ("word(1)", r"selector 'word\(1\)' needs a batch with marks"),
    ],
)
def test_a_mask_that_nobody_gave_is_asked_for(positions, message):
    with pytest.raises(UserError, match=message):
        masks_of(f"loreft:positions={positions},rank=1", BATCH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word(0)", "region in selector"),
        ("mark()", "region in selector"),
        ("mark(a):f1", "takes no slice"),
        ("word(2):l1", "takes no slice"),
    ],
)
def test_selectors_that_are_none_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_selector(text)


def test_too_many_marks_are_refused():
    with pytest.raises(UserError, match="31 marks and words at most, not 32"):
        mark_names([parse_selector(f"word({n})") for n in range(1, 33)])


@pytest.mark.parametrize("site", ["vision.block.out", "connector.out", "llm.block.out"])
@pytest.mark.parametrize("connector", ["resampler:latents=2,heads=2", "qformer:latents=2,heads=2"])
def test_a_region_needs_tokens_with_places(site, connector):
    config = dataclasses.replace(tiny_config(), connector=connector)
    with pytest.raises(UserError, match="needs visual tokens that stand for places"):
        MLLM(config, f"loreft:site={site},positions=image|roi")
