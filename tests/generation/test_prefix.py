"""What prompts begin with is read once: the tokens stay those of prompts that are read whole."""

import jax
import numpy as np
import pytest

from moresjax.analysis.attention import AttentionProbe
from moresjax.analysis.capture import StateProbe
from moresjax.core.layout import TokenKind
from moresjax.generation import programs
from moresjax.generation.config import DEFAULT_ENGINE_CONFIG, EngineConfig
from moresjax.generation.engine import Engine
from moresjax.generation.shared_prefix import common_prefix, find_shared_prefixes
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import talking_model, tiny_config, tiny_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import stack_adapters

NEW = 5
ALWAYS = EngineConfig(min_saved_tokens=1)  # however few tokens it saves
IMAGES = list(np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3)).astype(np.uint8))
HEAD = "how many times two ? three . is there a seven ? no . "
PROMPTS = [
    (HEAD + "<image> is there a two ?", [IMAGES[0]]),
    (HEAD + "what is the largest ?", []),
    (
        HEAD + "<image> what is at top-left ? <image> " + "are the two the same ? " * 4,
        [IMAGES[1], IMAGES[2]],
    ),
    (HEAD + "<image> how many times three ?", [IMAGES[2]]),
]
# Everything that acts on some token of a prompt without looking ahead.
TUNING = (
    "prompt:length=3/prefix:length=2/lora:rank=2/loreft:rank=2,positions=all/"
    "mores:rank=1,positions=image:f4+l5|answer:f1"
)


def test_a_shared_prefix_changes_no_token_and_no_statistic():
    states = StateProbe("llm.norm.out", None, "each")
    model, probes = talking_model(TUNING), (AttentionProbe(), states)
    rows = [model.prompts.row(*prompt) for prompt in PROMPTS]
    apart = jax.tree.map(np.asarray, model.service.generate_rows(rows, NEW, probes, logprobs=True))
    assert len({tuple(tokens) for tokens in apart.tokens.tolist()}) == len(rows)
    model.service.config = ALWAYS
    read = programs.read_prefix._cache_size()
    options = {"batch_size": 16, "probes": probes, "logprobs": True}
    done = model.service.generate_many(rows, NEW, **options)
    assert programs.read_prefix._cache_size() == read + 1
    for row, found in enumerate(done):
        count = len(found.tokens)
        assert count == apart.length[row]
        np.testing.assert_array_equal(found.tokens, apart.tokens[row, :count])
        np.testing.assert_allclose(found.logprobs, apart.logprobs[row, :count], atol=1e-4)
        expected = jax.tree.map(lambda x, row=row: x[:, row], apart.stats)
        own, state = (stats.pop(states.name)["state"] for stats in (found.stats, expected))
        np.testing.assert_allclose(own, state, atol=1e-5 * np.abs(state).max())
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found.stats, expected
        )


QUESTIONS = ["is there a two ?", "what is at top-left ? " * 5, "what is the largest ?", "three ?"]
PAIR = "<image> what is at top-left ? <image> are the two the same ?"
# Questions about four things, one of them a pair of images, in no order; and one about none.
ABOUT = [
    *((question, [image]) for question in QUESTIONS for image in IMAGES),
    *((PAIR + end, [IMAGES[0], IMAGES[1]]) for end in ("", " no .", " how many times three ?")),
    ("how many times two ?", []),
]


@pytest.mark.parametrize("text", ["", HEAD])
def test_images_that_several_prompts_are_about_are_read_once(text, monkeypatch):
    """Each on its own, with statistics; the batch makes groups of four, of two prefixes."""
    model, probes, known, read = talking_model(TUNING), (AttentionProbe(),), {}, []
    rows = [
        model.prompts.row(text + ("<image> " * (len(i) == 1)) + t, i, known=known) for t, i in ABOUT
    ]
    apart = jax.tree.map(np.asarray, model.service.generate_rows(rows, NEW, probes, logprobs=True))
    if text:
        model.service.config = ALWAYS
    run = Engine.read_prefix
    monkeypatch.setattr(
        Engine, "read_prefix", lambda self, *a: read.append((a[0].pixels, a[1])) or run(self, *a)
    )
    options = {"batch_size": 16, "probes": probes, "logprobs": True}
    order = np.random.default_rng(0).permutation(len(rows))
    done = model.service.generate_many([rows[i] for i in order], NEW, **options)
    if text:
        assert read[0] == (None, None)
        read = read[1:]
    # The pair of images, which is longer; then two images at a time.
    assert [pixels.shape[:2] for pixels, _ in read] == [(1, 2)] + [(2, 1)] * 2
    assert all((prefix is not None) == bool(text) for _, prefix in read)
    for row, found in zip(order, done, strict=True):
        count = len(found.tokens)
        assert count == apart.length[row]
        np.testing.assert_array_equal(found.tokens, apart.tokens[row, :count])
        np.testing.assert_allclose(found.logprobs, apart.logprobs[row, :count], atol=1e-4)
        jax.tree.map(
            lambda x, y, row=row: np.testing.assert_allclose(x, y[:, row], atol=1e-4),
            found.stats,
            apart.stats,
        )


@pytest.fixture(scope="module")
def rows() -> list:
    model = talking_model("none")
    return [model.prompts.row(*prompt) for prompt in PROMPTS]


def shared(rows, tuning: str = "none", config: EngineConfig = DEFAULT_ENGINE_CONFIG) -> int:
    """Tokens in common, 0 for none."""
    head = common_prefix(rows, Tuning(tuning, tiny_config(num_layers=2)), config)
    return 0 if head is None else len(head)


def test_the_prefix_ends_at_the_first_image_and_leaves_every_prompt_a_token(rows):
    first = int(np.argmax(rows[0].image >= 0))
    assert shared(rows, config=ALWAYS) == shared([rows[0], rows[3]], config=ALWAYS) == first
    assert shared([rows[1]] * 2, config=ALWAYS) == len(rows[1]) - 1
    other = rows[0][:9].append(rows[1].tokens, TokenKind.QUESTION)
    assert shared([rows[1], other], config=ALWAYS) == 9


def test_short_prefixes_and_few_prompts_are_read_as_they_are(rows):
    assert shared([rows[0]] * 2) == shared(rows[:1]) == shared([]) == 0
    assert shared([rows[0]] * 30) > 0
    few = [row[8:].replace(pixels=None) for row in rows]
    assert shared(few * 100) == 0


@pytest.mark.parametrize(
    "tuning",
    ["mixlora", "loreft:positions=question:f4", "loreft:positions=question:skip(0;1)"],
)
def test_methods_that_look_ahead_read_every_prompt_whole(rows, tuning):
    assert shared(rows * 30, "loreft:positions=question|answer:f4") > 0
    assert shared(rows * 30, tuning) == 0


def test_a_prefix_that_ends_before_an_answer_is_not_shared_by_edits_of_the_last_token(rows):
    asked = [rows[1].append([5, 6]).append([number], TokenKind.QUESTION) for number in (7, 8)]
    for end, together in ((len(rows[1]), False), (len(rows[1]) - 1, True)):
        some = [asked[0][: end + 1], asked[1][: end + 1]]
        some[1] = some[1][:end].append([9], TokenKind(int(asked[0].kind[end])))
        assert shared(some, "loreft:positions=image", ALWAYS) == end
        assert (shared(some, "loreft:positions=last_prompt", ALWAYS) == end) == together


LAST = "loreft:rank=2,positions=last_prompt|generated"


@pytest.mark.parametrize("tuning", [LAST, f"mores:rank=1,positions=image/prompt:length=2/{LAST}"])
@pytest.mark.parametrize("text", ["", HEAD])
def test_edits_of_the_last_prompt_token_share_what_stands_before(tuning, text, monkeypatch):
    model, known = talking_model(tuning), {}
    model.service.config = ALWAYS if text else DEFAULT_ENGINE_CONFIG
    asked = [(text + question, image) for question in QUESTIONS for image in IMAGES]
    rows = [model.prompts.row(prompt, [image], known=known) for prompt, image in asked]
    whole = jax.tree.map(np.asarray, model.service.generate_rows(rows, NEW, logprobs=True))
    read, run = [], Engine.read_prefix
    monkeypatch.setattr(
        Engine, "read_prefix", lambda self, *a: read.append(a[0].pixels) or run(self, *a)
    )
    done = model.service.generate_many(rows, NEW, batch_size=12, logprobs=True)
    assert sum(len(pixels) for pixels in read if pixels is not None) == len(IMAGES)
    for row, found in enumerate(done):
        count = whole.length[row]
        np.testing.assert_array_equal(found.tokens, whole.tokens[row, :count])
        np.testing.assert_allclose(found.logprobs, whole.logprobs[row, :count], atol=1e-4)
    untouched = talking_model("none")
    base = untouched.service.generate_rows(rows, NEW).tokens
    assert (np.asarray(base) != whole.tokens).any(1).mean() > 0.5
    pairs = [(row, np.asarray(ids)) for row in rows for ids in ([5, 6, 7], [8])]
    scores = model.service.score_rows(pairs, batch_size=12)
    apart = [model.service.score_rows([pair])[0] for pair in pairs[:4]]
    for one, other in zip(scores, apart, strict=False):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)


@pytest.mark.parametrize("images", [IMAGES[:1], []], ids=["image", "text"])
def test_vectors_that_cannot_meet_a_prompt_share_it(images, monkeypatch):
    """Two vectors and the base model answer one question, which is read once."""
    tunings = [talking_model(LAST).mllm.tuning for _ in range(2)]
    tunings[1].params["loreft"]["llm.block.out"]["weight"][...] *= -3
    model, known = talking_model("none"), {}
    model.mllm.tuning = stack_adapters(dict(zip("ab", tunings, strict=True)))
    model.service.config = ALWAYS
    rows = [model.prompts.row(QUESTIONS[0], images, known=known)] * 3
    names = ["a", None, "b"]
    whole = np.asarray(model.service.generate_rows(rows, NEW, adapters=names).tokens)
    assert len({tuple(tokens) for tokens in whole.tolist()}) == 3
    read, run = [], Engine.read_prefix
    monkeypatch.setattr(
        Engine, "read_prefix", lambda self, *a: read.append(a[0].tokens.shape) or run(self, *a)
    )
    done = model.service.generate_many(rows, NEW, batch_size=4, adapters=names)
    assert read == [(1, 16)]  # all but the last token, padded
    assert len(rows[0]) - 1 in range(1, 17)
    for tokens, found in zip(whole, done, strict=True):
        np.testing.assert_array_equal(found.tokens, tokens[: len(found.tokens)])


def test_the_prefixes_that_leave_fewer_tokens_are_read():
    model, known = talking_model("none"), {}
    tuning, everywhere = (
        Tuning(spec, model.config) for spec in (LAST, "loreft:rank=2,positions=all")
    )
    words = ("two ?", "six ?", "one ?", "no ?")
    rows = [model.prompts.row(text, IMAGES[:1], known=known) for text in words]

    def read(rows: list, names: list, tuning: Tuning = tuning) -> list[int]:
        found = find_shared_prefixes(rows, tuning, names, config=ALWAYS)
        assert found.tokens_read(rows) <= sum(map(len, rows))
        return [len(row) for row in found.rows]

    # One image with several questions, one vector each; then every question with three vectors.
    assert read(rows, ["a"] * 4) == [10]
    assert read(rows[:1] * 3, [*"abc"]) == [len(rows[0]) - 1]
    assert read([row for row in rows for _ in "abc"], [*"abc"] * 4) == [10]
    lone = [model.prompts.row(QUESTIONS[1] + "two ?" * n, IMAGES[n : n + 1]) for n in (0, 1)]
    assert read([row for row in lone for _ in "abc"], [*"abc"] * 2) == [len(r) - 1 for r in lone]
    assert read(rows[:1] * 3, [*"abc"], everywhere) == []


@pytest.mark.parametrize(
    ("tuning", "llm", "early"),
    [
        ("loreft:rank=1,positions=all,layers=1/lora:rank=1", {"qk_norm": True}, True),
        ("prompt:length=2/prefix:length=2", {"parallel": True}, True),
        ("none", {"window": 3, "attention_pattern": "gl"}, True),
        ("mixlora:rank=1", {}, False),
    ],
)
def test_the_last_layer_computes_only_tokens_that_are_asked_for(tuning, llm, early):
    model, batch = tiny_model(tuning, num_layers=2, **llm), tiny_batch()
    model.llm.unstack()
    queries = np.asarray([[3, 12, 14], [0, 5, 9]])
    asked = jax.jit(lambda batch: model(batch, queries=queries).hidden).trace(batch)
    assert (f"f32[6,{model.config.llm.intermediate_size}]" in str(asked.jaxpr)) == early
    whole = jax.jit(lambda batch: model(batch).hidden)(batch)
    expected = np.take_along_axis(np.asarray(whole), queries[:, :, None], axis=1)
    np.testing.assert_allclose(asked.lower().compile()(batch), expected, atol=1e-5)
