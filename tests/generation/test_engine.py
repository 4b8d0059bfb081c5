"""Generation: greedy ids of `transformers`, independence of padding and batch, one compilation."""

import dataclasses
import gc
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.layout import TokenKind, TokenLayout
from moresjax.generation import programs
from moresjax.generation.engine import Engine
from moresjax.generation.lengths import bucket
from moresjax.testing.batches import tiny_batch
from moresjax.testing.hf_llavas import IMAGES, NEW, PAD, VOCAB, Case, case_of
from moresjax.testing.models import talking_model, tiny_model

NEVER = (VOCAB + 1,)  # an end token that no row can produce


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("llama + clip")


@pytest.fixture(scope="module")
def engine(case) -> Engine:
    return Engine(case.model, eos_ids=NEVER, pad_id=PAD)


@pytest.fixture(scope="module")
def greedy(case, engine) -> np.ndarray:
    generation = engine.generate(case.batch(), NEW)
    np.testing.assert_array_equal(generation.length, NEW)
    return np.asarray(generation.tokens)


def test_greedy_ids(case, greedy):
    assert len({tuple(row) for row in greedy.tolist()}) == len(IMAGES)
    np.testing.assert_array_equal(greedy, case.expected())


@pytest.mark.parametrize("family", ["llama + clip", "phi + siglip", "gemma 2 + clip"])
def test_greedy_ids_with_rows_that_end_early(family):
    case = case_of(family)
    free = case.expected()
    # Two end tokens that a row says early on, and that together leave a row that never ends.
    said = dict.fromkeys(int(t) for row in free for t in row[1:-2])
    pairs = [(a, b) for a in said for b in said if a < b]
    eos = next(p for p in pairs if len(set(ends_of(free, p))) > 2 and NEW in ends_of(free, p))
    generation = Engine(case.model, eos_ids=eos, pad_id=PAD).generate(case.batch(), NEW)
    np.testing.assert_array_equal(generation.tokens, case.expected(list(eos)))
    np.testing.assert_array_equal(generation.length, ends_of(free, eos))


@pytest.mark.parametrize("continuous", [False, True])
def test_decoding_stops_when_all_rows_have_ended(case, greedy, continuous):
    eos = sorted({int(row[1]) for row in greedy})
    engine, rows = Engine(case.model, eos_ids=eos, pad_id=PAD), len(greedy)
    last = max(ends_of(greedy, eos))
    assert last < NEW - 1
    state = engine.prefill(case.batch(), NEW, limits=[NEW] * rows if continuous else None)
    if continuous:
        state = state.replace(steps_left=np.asarray(NEW), stop_after_done=np.asarray(rows))
    ended = programs.decode(engine._decode_static, engine.parameters[1], state)
    # The first token is that of the prefill.
    assert (NEW - int(ended.steps_left) if continuous else int(ended.step) - 1) == last - 1


def ends_of(tokens: np.ndarray, eos) -> list[int]:
    """Number of tokens of each row up to and with its first end token."""
    return [next((i + 1 for i, t in enumerate(row) if t in eos), len(row)) for row in tokens]


@pytest.mark.parametrize("options", [{"left": False}, {"left": True, "extra": 5}])
def test_padding_does_not_matter(case, engine, greedy, options):
    np.testing.assert_array_equal(engine.generate(case.batch(**options), NEW).tokens, greedy)


@pytest.mark.parametrize("left", [True, False])
def test_continuously_batched_rows_give_the_same_tokens(case, engine, greedy, left):
    rows = len(greedy)
    limits = [NEW, 1, 3, NEW]
    new = engine.prefill(case.batch(left=left), NEW, limits=limits, cache_length=64)
    state = engine.insert(None, new, [2, 0, 3, 1], rows)
    while not state.done.all():
        state = engine.advance(state, 3)
    for row, slot in enumerate([2, 0, 3, 1]):
        assert state.length[slot] == limits[row]
        expected = greedy[row, : limits[row]]
        np.testing.assert_array_equal(state.tokens[slot, : limits[row]], expected)


@pytest.mark.parametrize("chosen", [(1,), (3, 0)])
def test_other_rows_do_not_matter(case, engine, greedy, chosen):
    apart = engine.generate(case.batch(chosen=chosen), NEW)
    np.testing.assert_array_equal(apart.tokens, greedy[list(chosen)])


def test_teacher_forcing_gives_the_same_tokens(case, greedy):
    batch = case.batch(left=False)
    tokens, shape = greedy, greedy.shape
    valid = np.asarray(batch.layout.kind) != TokenKind.PAD
    position = valid.sum(1, keepdims=True) + np.arange(NEW)
    answer = {
        "kind": np.full(shape, int(TokenKind.ANSWER)),
        "image": np.full(shape, -1),
        "position": position,
        "document": np.zeros(shape),
        "branch": np.zeros(shape),
    }
    fields = {
        name: np.concatenate([getattr(batch.layout, name), x], axis=1).astype(np.int32)
        for name, x in answer.items()
    }
    layout = TokenLayout.stacked(fields, batch.layout.visual_tokens)
    whole = dataclasses.replace(
        batch, tokens=np.concatenate([batch.tokens, tokens], axis=1), layout=layout
    )
    logits = jax.jit(lambda model, batch: model.llm.logits(model(batch).hidden))(case.model, whole)
    length = batch.layout.shape[1]
    for row, wanted in enumerate(tokens):
        last = np.flatnonzero(valid[row])[-1]
        places = [last, *range(length, length + NEW - 1)]
        np.testing.assert_array_equal(np.asarray(logits)[row, places].argmax(-1), wanted)


def test_a_shorter_generation_is_a_prefix(case, engine, greedy):
    one = engine.generate(case.batch(chosen=(1,)), 1)
    np.testing.assert_array_equal(one.tokens, greedy[1:2, :1])
    np.testing.assert_array_equal(one.length, [1])


# The programs

# A shape that no other test uses, so that nothing has compiled it before.
UNIQUE = {"rows": 2, "images": 0, "answer": 7}


def test_one_shape_compiles_once():
    engine = Engine(tiny_model(), eos_ids=NEVER)
    both = programs.prefill, programs.decode
    before = [program._cache_size() for program in both]
    first = engine.generate(tiny_batch(**UNIQUE, seed=0), 5)
    assert [program._cache_size() for program in both] == [n + 1 for n in before]
    second = engine.generate(tiny_batch(**UNIQUE, seed=1), 5)
    assert [program._cache_size() for program in both] == [n + 1 for n in before]
    assert not np.array_equal(first.tokens, second.tokens)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = jax.tree.map(np.asarray, nnx.state(model))
    Engine(model, eos_ids=NEVER).generate(tiny_batch(**UNIQUE), 5)
    assert model.vision is not None
    assert not isinstance(model.llm.blocks, nnx.List)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_model_that_generates_holds_its_llm_once():
    model = talking_model("lora:rank=2")
    blocks = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.mllm.llm.blocks)))
    before, values = live_bytes(), jax.tree.map(np.array, nnx.state(model.mllm))
    texts = model.generate(["how many ?"], max_new_tokens=2)
    assert live_bytes() - before < blocks / 4
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model.restack()), values)
    assert live_bytes() - before < blocks / 4
    assert model.generate(["how many ?"], max_new_tokens=2) == texts


def test_a_model_that_has_generated_can_be_merged_and_attached_to():
    used, fresh = talking_model("lora:rank=2"), talking_model("lora:rank=2")
    used.generate(["how many ?"], max_new_tokens=2)
    for change in (lambda model: model.merge(), lambda model: model.attach("dora:rank=2") or model):
        states = [nnx.state(change(model).restack()) for model in (used, fresh)]
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_decoding_writes_into_the_donated_caches():
    model, batch, new = tiny_model(), tiny_batch(), 3
    text = Engine(model, eos_ids=NEVER).lower_decode(batch, new).as_text()
    config = model.config.llm
    rows, length = batch.layout.shape
    shape = f"{rows}x{config.num_kv_heads}x{length + new}x{config.head_dim}xf32"
    signature = next(line for line in text.splitlines() if "@main(" in line)
    caches = re.findall(rf"%arg\d+: tensor<{shape}>( {{[^%]*}})?", signature)
    assert len(caches) == 2 * config.num_layers  # keys and values
    for attributes in caches:
        assert "tf.aliasing_output" in attributes or "jax.buffer_donor" in attributes


def test_the_decode_program_has_no_vision_side():
    model = tiny_model()
    text = Engine(model, eos_ids=NEVER).lower_decode(tiny_batch(), 3).as_text()
    signature = next(line for line in text.splitlines() if "@main(" in line)
    vision = model.config.vision
    assert f"{vision.num_patches}x{vision.hidden_size}xf32" not in signature  # its positions
    llm = len(jax.tree.leaves(nnx.state(Engine(model, eos_ids=NEVER).parameters[1])))
    assert llm == 9 * model.config.llm.num_layers + 3  # per-layer weights; embedding, norm, head


@pytest.mark.parametrize("new", [0, -1])
def test_at_least_one_token(new):
    with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1, got {new}"):
        Engine(tiny_model(), eos_ids=NEVER).generate(tiny_batch(), new)


# Buckets


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_bucket_holds_the_length_and_never_falls(a, b):
    assert bucket(a) >= a
    assert bucket(a) < 2 * a or bucket(a) == 32
    assert bucket(bucket(a)) == bucket(a)
    assert (a <= b) <= (bucket(a) <= bucket(b))


def test_buckets():
    sizes = [32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448]
    assert sorted({bucket(n) for n in range(1, 400)}) == sizes
    assert sorted({bucket(n, 8) for n in range(1, 30)}) == [8, 12, 16, 20, 24, 28, 32]
