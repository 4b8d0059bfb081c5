"""Chat: a kept cache gives what reading the whole conversation anew gives."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample
from moresjax.data.templates import get_template
from moresjax.inference.chat import Chat, keeps_cache
from moresjax.inference.model import Model
from moresjax.testing.models import tiny_config, tiny_model
from moresjax.tuning.attach import Tuning

NEW = 4
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
OPENING = "what is at top-left ? " * 4 + "two seven three"  # all turns fit into one bucket


@pytest.fixture(scope="module")
def model() -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    tuning = "mores:rank=1,positions=image"
    mllm = tiny_model(tuning, vocab_size=len(vocabulary()), num_layers=2)
    # As they start, models say one word only.
    large = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, nnx.state(mllm, nnx.Param))
    nnx.update(mllm, large)
    return Model(mllm, processor)


def anew(model: Model, chat: Chat, images) -> str:
    """The last answer of a conversation, read as a whole."""
    last = dataclasses.replace(chat.turns[-1], answer=None)
    row = model.processor.row(Sample("all", (*chat.turns[:-1], last), tuple(images)))
    return model.prompts.decode(model.service.generate_rows([row], NEW))[0]


def test_every_turn_answers_as_if_all_were_read_anew(model):
    chat = Chat(model, max_new_tokens=NEW, chunk=2)
    read = []
    for question, images in ((OPENING, [IMAGE]), ("two ?", []), ("how ?", [])):
        pieces = list(chat.ask(question, images))
        assert "".join(pieces) == chat.turns[-1].answer == anew(model, chat, [IMAGE])
        read.append(chat.tokens_read)
    assert len({turn.answer for turn in chat.turns}) > 1
    assert read[0] > 30
    assert max(read[1:]) < 16  # the question and little more
    chat.reset()
    assert chat.turns == []


def test_an_image_in_a_later_turn_is_seen(model):
    chat = Chat(model, max_new_tokens=NEW)
    list(chat.ask("two ?"))
    list(chat.ask(OPENING, [IMAGE]))
    assert chat.turns[-1].answer == anew(model, chat, [IMAGE])
    assert chat.tokens_read > 30


@pytest.mark.parametrize(
    ("tuning", "kept"),
    [
        ("none", True),
        ("mores:positions=image:f4+l5", True),
        ("lora", True),
        ("mores:positions=all", True),
        ("mores:positions=question", False),
        ("mores:positions=all:skip(1;1)", False),
        ("mores:positions=image|prompt:l2", False),
        ("mixlora", False),
    ],
)
def test_the_cache_is_kept_where_no_edit_would_change_with_the_next_turn(tuning, kept):
    assert keeps_cache(Tuning(tuning, tiny_config())) == kept


def test_an_empty_question_is_refused(model):
    with pytest.raises(UserError, match="the question is empty"):
        next(Chat(model).ask(" "))
