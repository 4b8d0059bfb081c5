"""Many prompts in one batch: refilled rows, seeds, stop strings, prompts from a file."""

import json

import jax
import numpy as np
import pytest

from moresjax.analysis.attention import AttentionProbe
from moresjax.analysis.capture import StateProbe
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.generation.beam import Beams
from moresjax.generation.config import EngineConfig
from moresjax.generation.engine import Engine
from moresjax.generation.sampling import Sampling
from moresjax.inference.files import generate_file
from moresjax.inference.model import Model
from moresjax.testing.models import talking_model, tiny_model

NEW = 6
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
PROMPTS = [
    "is there a two ?",
    "what is at top-left ? " * 6,
    "what is the largest ?",
    "how many times three",
    "are top-left and top-right the same ?",
]
SAMPLING = Sampling(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)
SEEDS = [3, 1, 4]


@pytest.fixture(scope="module")
def model() -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    return Model(tiny_model(vocab_size=len(vocabulary()), num_layers=2), processor)


@pytest.fixture(scope="module")
def rows(model) -> list:
    """Two buckets, with and without an image."""
    return [model.prompts.row(p, [IMAGE] if i % 2 else []) for i, p in enumerate(PROMPTS)]


PROBES = AttentionProbe(), StateProbe("llm.norm.out", None, "each")


@pytest.fixture(scope="module")
def together(model, rows):
    """All rows as one ordinary batch."""
    return jax.tree.map(np.asarray, model.service.generate_rows(rows, NEW, PROBES, logprobs=True))


@pytest.fixture(scope="module")
def refilled(model, rows):
    """The same with two places, and limits that make the rows end at different times."""
    order = []
    done = model.service.generate_many(
        rows,
        [NEW, 2, NEW, 4, NEW],
        batch_size=2,
        probes=PROBES,
        logprobs=True,
        on_done=lambda number, _: order.append(number),
    )
    return done, order


def test_refilled_rows_are_those_of_one_batch(together, refilled):
    done, order = refilled
    assert sorted(order) == list(range(5))
    assert order != sorted(order)
    lengths = np.minimum(together.length, [NEW, 2, NEW, 4, NEW])
    assert [len(c.tokens) for c in done] == lengths.tolist()
    for row, completion in enumerate(done):
        count = len(completion.tokens)
        np.testing.assert_array_equal(completion.tokens, together.tokens[row, :count])
        np.testing.assert_allclose(completion.logprobs, together.logprobs[row, :count], atol=1e-5)


def test_statistics_of_refilled_rows_are_those_of_one_batch(together, refilled):
    for row in (0, 2, 4):
        expected = jax.tree.map(lambda x, row=row: x[:, row], together.stats)
        found = refilled[0][row].stats
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


def test_logprobs_are_those_of_the_whole_text(model, rows, together):
    tokens = together.tokens[0, : together.length[0]]
    ids = np.concatenate([rows[0].tokens, tokens])[None]
    scores = jax.nn.log_softmax(model.logits(input_ids=ids), axis=-1)[0]
    at = np.arange(len(tokens)) + len(rows[0]) - 1
    expected = np.asarray(scores)[at, tokens]
    np.testing.assert_allclose(together.logprobs[0, : len(tokens)], expected, atol=1e-5)


@pytest.fixture(scope="module")
def drawn(model, rows) -> list:
    options = {"batch_size": 2, "sampling": SAMPLING, "seeds": SEEDS}
    return model.service.generate_many(rows[::2], NEW, **options)


def test_a_draw_depends_on_its_own_seed_only(model, rows, drawn):
    apart = model.service.generate_rows(rows[::2], NEW, sampling=SAMPLING, seeds=SEEDS)
    for row, completion in enumerate(drawn):
        count = len(completion.tokens)
        assert count == apart.length[row]
        np.testing.assert_array_equal(completion.tokens, apart.tokens[row, :count])


def test_other_seeds_draw_other_tokens(model, rows, drawn):
    options = {"batch_size": 2, "sampling": SAMPLING}
    other = model.service.generate_many(rows[::2], NEW, seeds=[s + 10 for s in SEEDS], **options)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(drawn, other, strict=True))


def test_caches_grow_with_the_answers(model, rows, monkeypatch):
    limits, options = [40, 3, 40, 17, 40], {"batch_size": 4, "logprobs": True}
    whole = model.service.generate_many(rows, limits, **options)
    grown, grow = [], Engine.grow

    def note(self, state, cache_length):
        grown.append(cache_length - state.cache_layout.shape[1])
        return grow(self, state, cache_length)

    monkeypatch.setattr(Engine, "grow", note)
    config = EngineConfig(initial_new_tokens=5)
    small = Model(model.mllm, model.processor, engine_config=config)
    found = small.service.generate_many(rows, limits, **options)
    assert grown == [15, 20]  # from 5 new tokens to 20, and to the 40 that are asked for
    for one, other in zip(whole, found, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_knobs_of_the_engine_change_no_token(model, rows, refilled):
    config = EngineConfig(prefills_per_batch=1, decode_chunk=3, initial_new_tokens=1)
    other = Model(model.mllm, model.processor, engine_config=config)
    limits = [NEW, 2, NEW, 4, NEW]
    options = {"batch_size": 2, "probes": PROBES, "logprobs": True}
    found = other.service.generate_many(rows, limits, **options)
    assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in refilled[0]]


@pytest.mark.parametrize(
    ("knob", "value", "least"),
    [("decode_chunk", 0, 1), ("cache_growth", 1, 2), ("min_prompts_per_image", 0.5, 1)],
)
def test_knobs_out_of_range_are_named(knob, value, least):
    with pytest.raises(UserError, match=f"{knob} must be at least {least}, got {value}"):
        EngineConfig(**{knob: value})


def test_an_answer_ends_before_its_first_stop_string(model, rows, together):
    words = model.prompts.text(together.tokens[0, : together.length[0]]).split()
    expected = " ".join(words[: words.index(words[1])])
    done = model.service.generate_many(rows[:1], 64, batch_size=2, stop=words[1])
    # Rows are looked at every 16 steps.
    assert len(done[0].tokens) <= 17
    assert model.prompts.text(done[0].tokens, words[1]) == expected


def test_a_beam_search_gives_the_texts_of_its_rows(model, rows):
    prompts, images = PROMPTS[:2], [[], [IMAGE]]
    options = {"num_beams": 3, "length_penalty": 2.0}
    found = model.generate(prompts, images, max_new_tokens=NEW, **options)
    assert found == model.prompts.decode(
        model.service.generate_rows(rows[:2], NEW, beams=Beams(**options))
    )


def test_prompts_of_a_file_are_answered_and_bad_ones_named(model, rows, together, tmp_path):
    from PIL import Image

    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    records = [
        {"id": "a", "prompt": PROMPTS[0]},
        {"id": "b", "prompt": PROMPTS[3], "images": ["missing.png"]},
        {"prompt": PROMPTS[3], "images": ["image.png"]},
        {"id": "c", "prompt": " "},
        {"id": "d"},
        {"id": "e", "prompt": "two", "images": ["../image.png"]},
        {"id": "f", "prompt": "is " * 3000},
        {"id": "g", "prompt": "two", "images": [5]},
        {"id": "h", "prompt": "two", "images": ["broken.png"]},
        {"question_id": 7, "text": "two", "image": "image.png", "category": "x"},
    ]
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    counts = generate_file(
        model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=NEW, batch_size=2
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert counts == {"records": 10, "errors": 7}
    assert [line["id"] for line in lines] == ["a", "b", 2, "c", "d", "e", "f", "g", "h", 7]
    answers = model.prompts.decode(together)
    assert (lines[0]["text"], lines[2]["text"]) == (answers[0], answers[3])
    assert lines[9]["text"] == model.generate("two", tmp_path / "image.png", max_new_tokens=NEW)
    for number, reason in {
        1: "missing.png does not exist",
        3: "the prompt is empty",
        4: "record 4 has no text as its 'prompt'",
        5: "outside of the image root",
        6: "do not fit the model's 2048 positions",
        7: "image [5] is neither a path nor a list of paths",
        8: "broken.png cannot be read",
    }.items():
        assert reason in lines[number]["error"]
        assert "text" not in lines[number]


def test_learned_positions_may_be_used_up():
    """Padding and room for new tokens take no positions."""
    model, text = talking_model("none", positions="learned", max_positions=56), "two three . " * 11
    ids = [int(x) for x in model.prompts.row(text).tokens]
    (answer,) = model.service.generate_many([model.prompts.row(text)], 56 - len(ids), batch_size=1)
    expected = list(ids)
    while len(expected) < 56:
        logits = model.logits(input_ids=[expected + [0] * (56 - len(expected))])
        expected.append(int(logits[0, len(expected) - 1].argmax()))
    assert answer.tokens.tolist() == expected[len(ids) :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seeds": [1]}, "2 prompts but 1 seeds"),
        ({"max_new_tokens": 2045}, "6 tokens and max_new_tokens=2045 do not fit the model's 2048"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"num_beams": 2, "batch_size": 1}, "num_beams=2 cannot be used together with batch_size"),
        ({"num_beams": 2, "stop": "a"}, "num_beams=2 cannot be used together with stop"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(["is there a two ?"] * 2, **options)
