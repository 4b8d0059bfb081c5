"""Effects on a cache against a whole run for each intervention, with hooks on a LLaVA."""

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.inference.causes import EDGES, causes, knockouts
from moresjax.inference.model import Model
from moresjax.testing import talking_model
from moresjax.testing.hf_llavas import IMAGE_ID, case_of

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
PROMPT, ANSWER = "is there a two ?", "yes three"


class Oracle:
    """A LLaVA of `transformers` that runs once for every intervention."""

    def __init__(self, family: str) -> None:
        case = case_of(family)
        processor = Processor(
            build_tokenizer(),
            get_template("bare"),
            ImageProcessor(8),
            case.model.config.visual_tokens,
        )
        self.model, self.torch = Model(case.model, processor), case.oracle
        self.layers = list(case.oracle.model.language_model.layers)
        row = self.model.prompts.row(PROMPT, [IMAGES[0]])
        _, self.answer = self.model.prompts.with_answer(row, PROMPT, [IMAGES[0]], ANSWER)
        self.image = np.flatnonzero(row.image >= 0)
        self.first, self.prompt = int(self.image[-1]) + 1, len(row)
        ids = np.where(row.image >= 0, IMAGE_ID, row.tokens)
        self.ids = torch.tensor(np.concatenate([ids, self.answer[:-1]])[None])

    def prefix(self, image: np.ndarray, length: int):
        """The cache of the first tokens."""
        pixels = np.asarray(self.model.prompts.row(PROMPT, [image]).pixels, np.float32)
        with torch.no_grad():
            return self.torch(
                input_ids=self.ids[:, :length],
                pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1)),
                use_cache=True,
            ).past_key_values

    def score(self, cache, length: int) -> float:
        """The answer's log-probability, read behind a cache, which is used up."""
        with torch.no_grad():
            out = self.torch(input_ids=self.ids[:, length:], past_key_values=cache)
        logs = out.logits[0, self.prompt - 1 - length :].log_softmax(-1)
        return float(logs[np.arange(len(self.answer)), self.answer].sum())

    def edited(self, removal: str, layers, places, length: int) -> float:
        """The answer's log-probability on a cache of which some columns are replaced."""
        cache, other = self.prefix(IMAGES[0], length), self.prefix(IMAGES[1], length)
        for layer in layers:
            here, there = cache.layers[layer], other.layers[layer]
            for name in ("keys", "values"):
                x = getattr(here, name)
                if removal == "zero":
                    x[:, :, places] = 0
                elif removal == "swap":
                    x[:, :, places] = getattr(there, name)[:, :, places]
                else:
                    x[:, :, places] = self.mean(name, layer, x, length)[:, :, places]
        return self.score(cache, length)

    def mean(self, name: str, layer: int, x: torch.Tensor, length: int) -> torch.Tensor:
        """The mean of the visual tokens; keys are seen before their rotation, and turned again."""
        seen = []
        if name == "values":
            return x[:, :, self.image].mean(2, keepdim=True).expand_as(x)
        module = self.layers[layer].self_attn

        def put(_, arguments, output):
            seen.append(output)
            return output[:, self.image].mean(1, keepdim=True).expand_as(output)

        handle = module.k_proj.register_forward_hook(put)
        found = self.prefix(IMAGES[0], length).layers[layer].keys
        handle.remove()
        assert seen
        return found

    @contextlib.contextmanager
    def blind(self, layers, readers, keys, length: int):
        """Layers in which some tokens do not see others."""

        def hide(module, arguments, named):
            total, count = self.ids.shape[1], self.ids.shape[1] - length
            mask = torch.ones(count, total, dtype=torch.bool).tril(length)
            for reader in readers:
                mask[reader - length, keys] = False
            least = torch.finfo(torch.float32).min
            named = dict(named)
            named["attention_mask"] = torch.where(mask, 0.0, least)[None, None]
            return arguments, named

        chosen = [self.layers[n].self_attn for n in layers]
        handles = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle("llama + clip")


def check_effects(oracle: Oracle, removal: str, reads: str) -> None:
    length = oracle.first if reads == "question" else oracle.prompt - 1
    other: dict[str, Any] = {"other": IMAGES[1]} if removal == "swap" else {}
    options: dict[str, Any] = {"answer": ANSWER, "removal": removal, "reads": reads} | other
    found = causes(oracle.model, PROMPT, IMAGES[0], layers="each", batch_size=3, **options)
    value = oracle.score(oracle.prefix(IMAGES[0], length), length)
    layers = range(len(oracle.layers))
    wanted = [
        [value - oracle.edited(removal, [layer], [place], length) for place in oracle.image]
        for layer in layers
    ]
    assert found.layers == [(layer, layer + 1) for layer in layers]
    np.testing.assert_allclose(found.value, value, atol=1e-4)
    np.testing.assert_allclose(found.effects, wanted, atol=1e-4)
    assert np.ptp(found.effects) > 0.01
    np.testing.assert_allclose(found.grids[0].reshape(len(layers), -1), found.effects)


@pytest.mark.parametrize("reads", ["question", "answer"])
@pytest.mark.parametrize("removal", ["zero", "mean", "swap"])
def test_every_effect_is_that_of_a_run_of_its_own(oracle, removal, reads):
    check_effects(oracle, removal, reads)


def test_keys_that_are_turned_in_part_are_turned_back_for_their_mean():
    check_effects(Oracle("phi + siglip"), "mean", "question")


@pytest.mark.parametrize("layers", ["each", "all"])
def test_knocked_out_attention_is_that_of_masks_in_hooks(oracle, layers):
    found = knockouts(oracle.model, PROMPT, IMAGES[0], answer=ANSWER, layers=layers)
    length, prompt = oracle.first, oracle.prompt
    question, last = range(length, prompt - 1), range(prompt - 1, prompt + len(oracle.answer) - 1)
    edges = [(question, oracle.image), (last, oracle.image), (last, list(question))]
    prefix = oracle.prefix(IMAGES[0], length)
    value = oracle.score(copy.deepcopy(prefix), length)
    for edge, (readers, keys) in enumerate(edges):
        for number, (first, end) in enumerate(found.layers):
            with oracle.blind(range(first, end), readers, keys, length):
                wanted = value - oracle.score(copy.deepcopy(prefix), length)
            np.testing.assert_allclose(found.effects[edge, number], wanted, atol=1e-4)
    assert found.edges == EDGES
    changed = np.abs(found.effects) > 1e-3
    # What question tokens read in the last layer goes nowhere.
    assert changed.all() if layers == "all" else changed.sum() == 5
    assert layers == "all" or found.effects[0, 1] == 0


@pytest.mark.parametrize("tuning", ["mores:rank=1,positions=image:f4+l5", "prefix:length=2"])
def test_a_tuned_model_has_the_value_that_it_scores(tuning):
    model = talking_model(tuning)
    image, other = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8)
    whole = model.score("how many ?", ["two three"], image)[0].logprob
    options: dict[str, Any] = {"answer": "two three", "batch_size": 4}
    same = causes(model, "how many ?", image, removal="swap", other=image, **options)
    np.testing.assert_allclose(same.value, whole, atol=1e-4)
    np.testing.assert_allclose(same.effects, 0, atol=1e-5)
    # With all visual keys and values of another image, the answer is the other image's.
    swapped = causes(
        model, "how many ?", image, removal="swap", other=other, regions="images", **options
    )
    wanted = model.score("how many ?", ["two three"], other)[0].logprob
    np.testing.assert_allclose(swapped.value - swapped.effects[0, 0], wanted, atol=1e-4)
    assert abs(swapped.effects[0, 0]) > 1e-3


def test_hidden_noisy_and_grouped_regions():
    model, image = talking_model(), np.arange(432, dtype=np.uint8).reshape(12, 12, 3)
    options: dict[str, Any] = {"answer": "two", "removal": "hide"}
    cells = causes(model, "how many ?", image, regions="1x3", **options)
    assert cells.columns[1] == "<image 1 row 0 column 1>"
    masks = np.tile(np.eye(3, dtype=bool), 3)  # a column of 3 x 3 patches each
    given = causes(model, "how many ?", image, regions=masks, **options)
    np.testing.assert_array_equal(cells.effects, given.effects)
    np.testing.assert_allclose(cells.grids[0, 0], np.tile(cells.effects, (3, 1)))
    # A visual token that nothing behind it sees is one that attention is knocked out of.
    whole = causes(model, "how many ?", image, regions="images", layers="each", **options)
    edges = knockouts(model, "how many ?", image, answer="two")
    np.testing.assert_allclose(whole.effects[1], edges.effects[1, 1], atol=1e-5)
    draws = [
        causes(model, "how many ?", image, answer="two", removal="noise", seed=seed).effects
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-4
    both = causes(model, "how many ?", [image] * 2, answer="two", roi=[[(0, 0, 0.5, 1)], []])
    assert both.columns[9] == "<image 2:0>"
    assert both.grids.shape == (2, 1, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"removal": "cut"}, "unknown removal 'cut'; choose from: mean, zero, noise, swap, hide"),
        ({"removal": "swap"}, "other images go with the removal swap"),
        ({"layers": 3}, "a window must have 1 to 2 layers, got 3"),
        ({"layers": "some"}, "layers must be all, each or the width of a window, got 'some'"),
        ({"layers": [(1, 1)]}, "layers 1 to 0 are no part of the 2 layers"),
        ({"regions": "rows"}, "regions must be tokens, images, roi or ROWSxCOLUMNS, got 'rows'"),
        ({"regions": "roi"}, "regions roi need to be told the region"),
        ({"regions": np.ones((1, 4), bool)}, r"regions must be a bool array \[regions, 9\]"),
        ({"reads": "image"}, "unknown reads 'image'; choose from: question, answer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"images": ()}, "causes in an image need an image"),
        ({"prompt": "two <image>"}, "no token of the prompt stands behind its last image"),
    ],
)
def test_what_has_no_causes_is_told(options, message):
    asked: dict[str, Any] = {
        "prompt": "how many ?",
        "images": np.zeros((12, 12, 3), np.uint8),
        "answer": "two",
    }
    asked |= options
    with pytest.raises(UserError, match=message):
        causes(talking_model(), asked.pop("prompt"), asked.pop("images"), **asked)


def test_a_tuning_that_sees_all_tokens_at_once_is_told():
    image = np.zeros((12, 12, 3), np.uint8)
    with pytest.raises(UserError, match=r"tuning mixlora.* looks at all tokens of a row at once"):
        causes(talking_model("mixlora"), "how many ?", image, answer="two")
