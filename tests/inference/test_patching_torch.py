"""Activation patching against forward hooks on a LLaVA of `transformers`."""

import contextlib

import numpy as np
import pytest
import torch

from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.inference.analyze import patching
from moresjax.inference.model import Model
from moresjax.testing.hf_llavas import IMAGE_ID, case_of

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
PROMPT, ANSWERS = "is there a two ?", ("two", "three")
# A site, and the module of a block whose output it is.
SITES = {"llm.block.out": "", "llm.block.attn.out": "self_attn", "llm.block.mlp.out": "mlp"}


@pytest.fixture(scope="module")
def both():
    """A model, its oracle, and the inputs of the oracle for both questions."""
    case = case_of("llama + clip")
    visual = case.model.config.visual_tokens
    tokenizer = build_tokenizer()
    processor = Processor(tokenizer, get_template("bare"), ImageProcessor(8), visual)
    model, inputs = Model(case.model, processor), []
    for image in IMAGES:
        row = model.prompts.row(PROMPT, [image])
        ids = np.where(np.asarray(row.image) >= 0, IMAGE_ID, row.tokens)
        pixels = np.moveaxis(np.asarray(row.pixels, np.float32), -1, 1)
        inputs.append({"input_ids": torch.tensor(ids[None]), "pixel_values": torch.tensor(pixels)})
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ANSWERS]
    return model, case.oracle, inputs, answers


@contextlib.contextmanager
def hooked(modules, hook):
    """A hook on the outputs of modules, which may be the first of several."""

    def on(number):
        def call(module, arguments, output):
            several = isinstance(output, tuple)
            new = hook(number, output[0] if several else output)
            return (new, *output[1:]) if several else new

        return call

    handles = [module.register_forward_hook(on(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", SITES)
def test_every_score_is_that_of_hooks(both, site):
    model, oracle, inputs, (one, other) = both
    layers = oracle.model.language_model.layers
    modules = [getattr(layer, SITES[site]) if SITES[site] else layer for layer in layers]

    def score(question, hook) -> float:
        with hooked(modules, hook), torch.no_grad():
            logits = oracle(**question).logits[0, -1]
        return float(logits[one] - logits[other])

    clean: dict[int, torch.Tensor] = {}

    def keep(number, x):
        clean[number] = x.clone()
        return x

    def put(layer, place):
        def hook(number, x):
            if number == layer:
                x = x.clone()
                x[:, place] = clean[layer][:, place]
            return x

        return hook

    wanted_clean, wanted_corrupt = score(inputs[0], keep), score(inputs[1], lambda _, x: x)
    tokens = inputs[0]["input_ids"].shape[1]
    wanted = [
        [score(inputs[1], put(n, place)) for place in range(tokens)] for n in range(len(layers))
    ]
    first, second = ((PROMPT, image) for image in IMAGES)
    found = patching(model, first, second, ANSWERS, site=site, each_visual_token=True)
    assert found.scores.shape == (len(layers), tokens)
    np.testing.assert_allclose(found.clean, wanted_clean, atol=1e-4)
    np.testing.assert_allclose(found.corrupt, wanted_corrupt, atol=1e-4)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-4)
    assert np.ptp(found.scores) > 0.01
    # All visual tokens of an image at a time.
    whole = patching(model, first, second, ANSWERS, site=site)
    image = (inputs[0]["input_ids"][0] == IMAGE_ID).nonzero().ravel()
    column = whole.columns.index("<image 1>")
    swapped = [score(inputs[1], put(n, image)) for n in range(len(layers))]
    np.testing.assert_allclose(whole.scores[:, column], swapped, atol=1e-4)
