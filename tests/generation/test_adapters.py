"""Adapters chosen by name for scores and for a chat: each as if it were attached alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.inference.chat import Chat
from moresjax.inference.model import Model
from moresjax.testing.models import tiny_config, tiny_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import stack_adapters

SIZES = {"vocab_size": len(vocabulary()), "num_layers": 2}
SPEC = "mores:rank=1,positions=image/lora:rank=2,targets=q"
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
PROMPT, ANSWERS = "is there a two ?", ["yes", "two seven"]


def random_tuning(seed: int) -> Tuning:
    tuning, rng = Tuning(SPEC, tiny_config(**SIZES)), np.random.default_rng(seed)
    for variable in jax.tree.leaves(tuning.params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), jnp.float32))
    return tuning


def model_with(tuning: Tuning | None) -> Model:
    mllm = tiny_model(**SIZES)
    # As they start, models say one word only.
    nnx.update(mllm, jax.tree.map(lambda x: 12 * x, nnx.state(mllm, nnx.Param)))
    mllm.tuning = tuning or mllm.tuning
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    return Model(mllm, processor)


@pytest.fixture(scope="module")
def together() -> Model:
    return model_with(stack_adapters({"a": random_tuning(1), "b": random_tuning(2)}))


@pytest.fixture(scope="module")
def alone() -> dict[str | None, Model]:
    return {
        "a": model_with(random_tuning(1)),
        "b": model_with(random_tuning(2)),
        None: model_with(None),
    }


def test_scores_are_those_of_each_adapter_alone(together, alone):
    names = ["b", None, "a"]
    options = {"images": [[IMAGE]] * 3, "batch_size": 2}
    found = together.score([PROMPT] * 3, [ANSWERS] * 3, adapters=names, **options)
    for name, scores in zip(names, found, strict=True):
        (expected,) = alone[name].score([PROMPT], [ANSWERS], [[IMAGE]], batch_size=2)
        for one, other in zip(scores, expected, strict=True):
            # In batches of other sizes, sums have another order.
            assert one.logprob == pytest.approx(other.logprob, rel=1e-6)
            assert one.is_greedy == other.is_greedy
    assert len({round(scores[0].logprob, 2) for scores in found}) == 3


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_chat_is_that_of_its_adapter_alone(together, alone, name):
    chats = [Chat(together, max_new_tokens=4, adapter=name), Chat(alone[name], max_new_tokens=4)]
    for chat in chats:
        for question, images in ((PROMPT, [IMAGE]), ("how ?", [])):
            list(chat.ask(question, images))
    assert chats[0].turns == chats[1].turns
    base = Chat(alone[None], max_new_tokens=4)
    list(base.ask(PROMPT, [IMAGE]))
    assert base.turns[0] != chats[0].turns[0]


def test_unknown_adapters_are_named(together, alone):
    with pytest.raises(UserError, match="unknown adapter 'c'; choose from: a, b, base"):
        Chat(together, adapter="c")
    with pytest.raises(UserError, match="unknown adapter 'c'"):
        together.score([PROMPT], [ANSWERS], adapters=["c"])
    with pytest.raises(UserError, match="has a single tuning"):
        Chat(alone["a"], adapter="a")
