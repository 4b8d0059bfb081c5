"""Activations that are read and written by name; the logit lens and activation patching."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from moresjax.core.errors import UserError
from moresjax.inference.analyze import logit_lens, patching
from moresjax.inference.model import Model
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.models import digits_processor, randomised_tuning, tiny_model

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8)
PROMPT = "is there a two ?"
SITES = "llm.embed.out", "llm.block.out", "llm.norm.out", "connector.out"


@pytest.fixture(scope="module")
def model() -> Model:
    mllm = tiny_model("prompt:length=2", vocab_size=37, num_layers=2)
    return Model(randomised_tuning(mllm), digits_processor())


@pytest.fixture(scope="module")
def clean(model):
    return model.run(PROMPT, IMAGES[0], read=SITES)


def test_what_is_read_gives_the_logits(model, clean):
    np.testing.assert_allclose(clean.logits, model.logits(PROMPT, IMAGES[0]), atol=1e-5)
    size = 9 + len(model.prompts.tokenizer(PROMPT)["input_ids"])
    assert clean.states["llm.block.out"].shape == (2, 1, clean.lengths[0], 16)
    assert clean.lengths[0] >= size - 1
    last = model.mllm.llm.norm(jnp.asarray(clean.states["llm.block.out"][1]))
    np.testing.assert_allclose(last, clean.states["llm.norm.out"], atol=1e-5)
    np.testing.assert_allclose(
        clean.states["llm.embed.out"][0, 1:10], clean.states["connector.out"][0], atol=1e-6
    )


def test_what_is_written_is_what_the_next_layers_read(model, clean):
    for edits in (
        {"connector.out": clean.states["connector.out"]},
        {("llm.block.out", 0): clean.states["llm.block.out"][0]},
        {"llm.norm.out": clean.states["llm.norm.out"]},
    ):
        found = model.run(PROMPT, IMAGES[1], edits=edits, read="llm.block.out")
        np.testing.assert_allclose(found.logits, clean.logits, atol=1e-5)
    other = model.run(PROMPT, IMAGES[1], read="llm.block.out")
    assert np.abs(other.logits - clean.logits).max() > 1e-3
    np.testing.assert_allclose(found.states["llm.block.out"], other.states["llm.block.out"])
    # nan leaves an activation as it is.
    part = np.full((1, int(clean.lengths[0]), 16), np.nan, np.float32)
    part[:, 3] = 7
    edits = {("llm.block.out", 1): part}
    found = model.run(PROMPT, IMAGES[1], edits=edits, read="llm.block.out").states["llm.block.out"]
    np.testing.assert_array_equal(found[1, 0, 3], 7)
    kept = np.arange(found.shape[2]) != 3
    np.testing.assert_allclose(found[:, :, kept], other.states["llm.block.out"][:, :, kept])


def test_a_function_is_a_steering_vector(model):
    vector = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    steered = Model(
        tiny_model("steer:positions=all,layers=1", vocab_size=37, num_layers=2), digits_processor()
    )
    bare = Model(tiny_model("none", vocab_size=37, num_layers=2), digits_processor())
    steered.set(vector=vector)
    edits = {("llm.block.out", 1): lambda h: h + vector}
    expected = steered.logits(PROMPT)
    np.testing.assert_allclose(bare.run(PROMPT, edits=edits).logits, expected, atol=1e-5)
    bare.service.engine()  # its blocks are a list from now on
    np.testing.assert_allclose(bare.run(PROMPT, edits=edits).logits, expected, atol=1e-5)
    bare.shard(make_mesh())
    np.testing.assert_allclose(bare.run(PROMPT, edits=edits).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "llm.block.q"}, "unknown site 'llm.block.q'"),
        ({"edits": {("llm.block.out", 2): 0.0}}, "has layers 0 to 1"),
        ({"edits": {"llm.embed.out": np.ones(5)}}, r"has shape \(5,\), the activations \(1, 6, 16"),
        ({"edits": {"llm.embed.out": lambda h: h[0]}}, r"gives shape \(6, 16\)"),
    ],
)
def test_what_cannot_be_written_is_told(model, options, message):
    with pytest.raises(UserError, match=message):
        model.run(PROMPT, **options)


def test_the_lens_of_the_last_layer_is_the_model(model, clean):
    lens = logit_lens(model, PROMPT, IMAGES[0], words=["two", "three"], top=3)
    logprobs = torch.log_softmax(torch.tensor(clean.logits[0]), -1).numpy()
    np.testing.assert_allclose(lens.logprobs[-1], -np.sort(-logprobs)[:, :3], atol=1e-5)
    decode, best = model.prompts.tokenizer.decode, logprobs.argmax(-1)
    assert [place[0] for place in lens.top[-1]] == [decode([i]) for i in best]
    two = model.prompts.tokenizer.convert_tokens_to_ids("two")
    np.testing.assert_allclose(lens.word_logprobs[-1, :, 0], logprobs[:, two], atol=1e-5)
    np.testing.assert_allclose(lens.grids[0, 0, -1], logprobs[1:10, two].reshape(3, 3), atol=1e-5)
    assert lens.tokens[:11] == ["<s>", *["<image>"] * 9, "is"]
    first = model.mllm.llm.logits(
        model.mllm.llm.norm(jnp.asarray(clean.states["llm.block.out"][0]))
    )
    expected = torch.log_softmax(torch.tensor(np.asarray(first[0])), -1).numpy()
    np.testing.assert_allclose(lens.word_logprobs[0, :, 0], expected[:, two], atol=1e-5)
    with pytest.raises(UserError, match="top must be from 1 to 37, got 0"):
        logit_lens(model, PROMPT, top=0)


def test_patching_puts_in_one_state_at_a_time(model, clean):
    questions = [(PROMPT, image) for image in IMAGES]
    found = patching(model, *questions, ("two", "three"), batch_size=5)
    ids = [model.prompts.tokenizer.convert_tokens_to_ids(word) for word in ("two", "three")]

    def score(run) -> float:
        return float(run.logits[0, -1, ids[0]] - run.logits[0, -1, ids[1]])

    np.testing.assert_allclose(found.clean, score(clean), atol=1e-5)
    assert found.columns[:3] == ["<s>", "<image 1>", "is"]
    assert len(found.columns) == clean.lengths[0] - 8
    states = clean.states["llm.block.out"]
    for layer, column in ((0, 1), (0, 2), (1, len(found.columns) - 1)):
        part = np.full_like(states[layer], np.nan)
        places = slice(1, 10) if column == 1 else [column + 8]
        part[:, places] = states[layer][:, places]
        run = model.run(PROMPT, IMAGES[1], edits={("llm.block.out", layer): part})
        np.testing.assert_allclose(found.scores[layer, column], score(run), atol=1e-5)
    # After the last block nothing but the last token counts.
    np.testing.assert_allclose(found.effect[-1, -1], 1, atol=1e-3)
    np.testing.assert_allclose(found.effect[-1, :-1], 0, atol=1e-3)
    # Only the image differs where tokens come in.
    swap = patching(model, *questions, ("two", "three"), site="llm.embed.out")
    np.testing.assert_allclose(swap.effect[0, 1], 1, atol=1e-3)
    np.testing.assert_allclose(swap.effect[0, [0, *range(2, len(swap.columns))]], 0, atol=1e-3)
    each = patching(
        model, *questions, ("two", "three"), site="llm.embed.out", each_visual_token=True
    )
    assert each.columns[:3] == ["<s>", "<image 1:0>", "<image 1:1>"]


def test_what_cannot_be_patched_is_told(model):
    with pytest.raises(UserError, match="patching needs as many"):
        patching(model, PROMPT, "a longer question than that ?", ("two", "three"))
    with pytest.raises(UserError, match="begin with the same token"):
        patching(model, PROMPT, PROMPT, ("two", "two"))
    with pytest.raises(UserError, match=r"connector\.out has none"):
        patching(model, PROMPT, PROMPT, ("two", "three"), site="connector.out")
    with pytest.raises(UserError, match="same score"):
        print(patching(model, PROMPT, PROMPT, ("two", "three"), site="llm.norm.out").effect)
