"""Scores of continuations: those of separate forward passes."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.generation import programs
from moresjax.generation.config import EngineConfig
from moresjax.generation.engine import Engine
from moresjax.generation.scoring import with_branches
from moresjax.inference import service
from moresjax.inference.model import Model
from moresjax.testing.models import talking_model, tiny_model

PROMPT = "is there a two ?"
IMAGES = list(np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8))
ANSWERS = ["yes", "two seven", "is there a three", "yes two"]


@pytest.fixture(scope="module")
def model() -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    tuning = "mores:rank=1,positions=image"
    return Model(tiny_model(tuning, vocab_size=len(vocabulary()), num_layers=2), processor)


all_logits = jax.jit(lambda model, batch: model.llm.logits(model(batch).hidden))


def alone(model: Model, images, ids) -> tuple[float, bool]:
    """One continuation in a row of its own, from all of its logits."""
    row = model.prompts.row(PROMPT, images)
    answer = {"tokens": ids, "kind": int(TokenKind.ANSWER), "image": -1, "document": 0}
    head = len(row)
    fields = {
        name: np.concatenate([x, np.broadcast_to(answer.get(name, 0), len(ids))])
        for name, x in row.fields.items()
    }
    fields["position"] = np.arange(head + len(ids))
    whole = row.replace(**{name: x.astype(np.int32) for name, x in fields.items()})
    batch = model.service.batch([whole], 40)
    logits = all_logits(model.mllm, batch)[0, head - 1 : head + len(ids) - 1]
    scores = np.asarray(jax.nn.log_softmax(logits))
    greedy = bool((scores.argmax(-1) == ids).all())
    return float(scores[np.arange(len(ids)), ids].sum()), greedy


def test_answers_that_share_a_prompt_score_as_they_do_alone(model):
    first = model.service.generate_rows([model.prompts.row(PROMPT, IMAGES[:1])], 1).tokens[0, 0]
    best = model.processor.tokenizer.decode([int(first)])
    prompts, images = [PROMPT, PROMPT], [IMAGES[:1], IMAGES[1:]]
    answers = [[*ANSWERS, best], ANSWERS]
    found = model.score(prompts, answers, images, batch_size=2)
    assert [len(scores) for scores in found] == [5, 4]
    for own, texts, scores in zip(images, answers, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            ids = model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            logprob, greedy = alone(model, own, np.asarray(ids))
            assert score.logprob == pytest.approx(logprob, abs=1e-5)
            assert (score.is_greedy, score.num_tokens) == (greedy, len(ids))
    assert found[0][-1].is_greedy
    assert found[0][0].logprob != pytest.approx(found[1][0].logprob, abs=1e-3)


@pytest.mark.parametrize("images", [IMAGES, [None]], ids=["images", "text"])
def test_questions_that_begin_alike_have_their_beginning_read_once(images, monkeypatch):
    """About two images, or after a long text."""
    model, read = talking_model("lora:rank=2/prefix:length=2/mores:rank=1,positions=image:f4"), []
    text = "" if images[0] is not None else "how many times two ? three . " * 16
    asked = [
        (text + question, [] if image is None else [image])
        for question in ("is there a two ?", "what is the largest ?", "how many times three ?")
        for image in images
    ]
    asked.append((text + "is there a seven ? no .", asked[0][1]))
    prompts, own = zip(*asked, strict=True)
    apart = [model.score([p], [ANSWERS], [i])[0] for p, i in asked]
    run = Engine.read_prefix

    def note(self, batch, prefix=None):
        read.append(len(batch.tokens))
        return run(self, batch, prefix)

    monkeypatch.setattr(Engine, "read_prefix", note)
    found = model.score(prompts, [ANSWERS] * len(asked), own, batch_size=4)
    assert read == ([2] if len(images) == 2 else [1])
    for one, other in zip(apart, found, strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.logprob == pytest.approx(y.logprob, rel=1e-5)
            assert (x.is_greedy, x.num_tokens) == (y.is_greedy, y.num_tokens)
    assert len({round(scores[0].logprob, 3) for scores in found}) == len(asked)


def test_an_empty_answer_is_refused(model):
    with pytest.raises(UserError, match="an answer to score is empty: 'is there a two"):
        model.score([PROMPT], [["yes", " "]])


def test_logits_of_long_answers_are_never_all_in_memory(model):
    row = model.prompts.row(PROMPT)
    whole = with_branches(row, [np.arange(40) % 7, np.arange(30) % 5])
    batch = model.service.batch([whole.row] * 2, 96)
    queries, targets = np.stack([whole.queries] * 2), np.stack([whole.targets] * 2)
    graphdef, params = nnx.split(model.mllm)
    data = programs.ScoreData(params, batch, queries, targets)
    vocabulary = model.config.llm.vocab_size
    logits = jax.nn.log_softmax(all_logits(model.mllm, batch))[0]
    # 70 tokens of two rows: as many at a time as there is room for, one at least.
    for room, expected in ((2**28, 70), (2 * 8 * 4 * vocabulary, 8), (1, 1)):
        static = programs.ScoreStatic(graphdef, logits_bytes=room)
        program = programs.score.lower(static, data).as_text()
        shapes = {int(n) for n in re.findall(rf"tensor<2x(\d+)x{vocabulary}xf32>", program)}
        assert shapes == {expected}
        logprobs, _ = programs.score(static, data)
        np.testing.assert_allclose(logprobs[1], logits[whole.queries, whole.targets], atol=1e-5)


def test_small_batches_are_not_filled_up(model, monkeypatch):
    """Neither where prompts are scored nor where they are answered."""
    scored, slots, read = [], [], []
    run, insert = programs.score, Engine.insert

    def note(static, data):
        scored.append(len(data.batch.tokens))
        return run(static, data)

    def note_slots(self, state, new, places, rows):
        slots.append(rows)
        read.append(len(new.done))
        return insert(self, state, new, places, rows)

    monkeypatch.setattr(service, "score_program", note)
    monkeypatch.setattr(Engine, "insert", note_slots)
    monkeypatch.setattr(model.service, "config", EngineConfig(min_prefix_tokens=10**6))
    words = vocabulary()[10:19]
    texts = [f"is there a {word} ?" for word in words]
    found = model.score(texts, [["yes"]] * 9, batch_size=4)
    assert scored == [4, 4, 1]
    scored.clear()
    for (one,), (other,) in zip(
        model.score(texts[:2], [["yes"]] * 2, batch_size=64), found, strict=False
    ):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-6)
    assert scored == [2]
    for count, batch, expected in ((2, 64, (2, [2])), (5, 8, (8, [2, 2, 1])), (3, 2, (2, [1] * 3))):
        slots.clear()
        read.clear()
        rows = [model.prompts.row(text) for text in texts[:count]]
        model.service.generate_many(rows, 2, batch_size=batch)
        assert ({*slots}, read) == ({expected[0]}, expected[1])


def test_an_answer_that_does_not_fit_is_refused(model):
    model = talking_model("prefix:length=2", max_positions=16)
    prompt = "how many times two ? " * 2
    assert len(model.prompts.row(prompt)) == 11
    model.score([prompt], [["two two two two"]])  # of which the last is not read
    with pytest.raises(
        UserError, match="13 tokens and an answer of 5 tokens do not fit the model's 16"
    ):
        model.score([prompt], [["two", "two two two two two"]])
