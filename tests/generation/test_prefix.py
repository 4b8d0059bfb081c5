"""What prompts begin with is read once: the tokens stay those of prompts that are read whole."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_model

from moresjax.analysis.attention import AttentionProbe
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.generation import engine as engine_module
from moresjax.generation import prefix as prefix_module
from moresjax.generation.prefix import common_prefix
from moresjax.model import Model

NEW = 5
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3)).astype(np.uint8)
HEAD = "how many times two ? three . is there a seven ? no . "
PROMPTS = [
    (HEAD + "<image> is there a two ?", [IMAGES[0]]),
    (HEAD + "what is the largest ?", []),
    (HEAD + "<image> what is at top-left ? <image> " + "are the two the same ? " * 4, [IMAGES[1], IMAGES[2]]),
    (HEAD + "<image> how many times three ?", [IMAGES[2]]),
]
TUNINGS = [
    "none",
    "mores:rank=2,positions=image:f4+l5/loreft:rank=2,positions=all/lora:rank=2",
    "prompt:length=3/prefix:length=2/loreft:rank=2,positions=generated|image",
]


def model_with(tuning: str) -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    mllm = tiny_model(tuning, vocab_size=len(vocabulary()), num_layers=2)
    rng = np.random.default_rng(1)
    # As they start, models say one word only and some methods do nothing.
    state = jax.tree.map(lambda x: 12 * x, nnx.state(mllm, nnx.Param))
    state["tuning"] = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), state.get("tuning", {})
    )
    nnx.update(mllm, state)
    return Model(mllm, processor)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_shared_prefix_changes_no_token_and_no_statistic(tuning, monkeypatch):
    model, probes = model_with(tuning), (AttentionProbe(),)
    rows = [model.prompt(*prompt) for prompt in PROMPTS]
    apart = jax.tree.map(np.asarray, model.generate_rows(rows, NEW, probes, logprobs=True))
    assert len({tuple(tokens) for tokens in apart.tokens.tolist()}) == len(rows)
    monkeypatch.setattr(prefix_module, "SAVED", 1)
    read = engine_module._read_prefix._cache_size()
    options = {"batch_size": 4, "probes": probes, "logprobs": True}
    done = model.generate_many(rows, NEW, **options)
    assert engine_module._read_prefix._cache_size() == read + 1
    for row, found in enumerate(done):
        count = len(found.tokens)
        assert count == apart.length[row]
        np.testing.assert_array_equal(found.tokens, apart.tokens[row, :count])
        np.testing.assert_allclose(found.logprobs, apart.logprobs[row, :count], atol=1e-4)
        expected = jax.tree.map(lambda x, row=row: x[:, row], apart.stats)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found.stats, expected
        )
