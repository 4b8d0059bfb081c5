"""Learned tokens and learned keys and values, against loops over the blocks and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import AttentionMaps
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind, visible
from moresjax.generation.engine import Engine
from moresjax.models.block import LayerCache
from moresjax.models.initialize import initialize
from moresjax.models.layers import rope_table
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionConfig
from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.models import TINY_VISION, tiny_config, tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.hooks import AttachedEdit, TowerHooks
from moresjax.tuning.masks import extend_layout
from moresjax.tuning.methods.lora import LoRA

EVERY = "prompt:length=1/prefix:length=2/vpt:length=2/vpt:deep=false,length=1/ptum:length=2"
NEW = 5

forward = jax.jit(lambda model, batch: model.llm.logits(model(batch).hidden))


def noisy(spec: str, **llm) -> MLLM:
    """A model whose virtual tokens have content of size 1."""
    model = tiny_model(spec, **llm)
    rng = np.random.default_rng(3)
    for variable in jax.tree.leaves(
        model.tuning.params, is_leaf=lambda x: isinstance(x, nnx.Param)
    ):
        variable[...] = jnp.asarray(rng.standard_normal(variable.shape), jnp.float32)
    return model


def content(model, method, site):
    return {name: x[...] for name, x in model.tuning.params[method][site].items()}


def at(stacked, layer):
    """One layer of a stack."""
    return jax.tree.map(lambda x: x[layer], stacked)


def before(rows, h):
    return jnp.concatenate([jnp.broadcast_to(rows, (len(h), *rows.shape)), h], axis=1)


@jax.jit
def decoder_by_hand(model, batch) -> jax.Array:
    """Hidden states under a prompt, a prefix and deep tokens, in this order, from bare blocks."""
    config, no_hooks = model.config.llm, TowerHooks().layer([], 0)
    prompt = content(model, "prompt", "llm.embed")["embedding"]
    deep = content(model, "ptum", "llm.block.in")["embedding"]
    kv = content(model, "prefix", "llm.block.kv")
    p, d, rows = len(prompt), deep.shape[1], kv["k"].shape[1]
    full = extend_layout(batch.layout, rows + p + d)
    embedded = model.embed(batch, model.tuning.hooks(batch))
    h = before(prompt, before(jnp.zeros_like(deep[0]), embedded))
    # The keys of the prefix are put where an earlier step would have left them in a cache.
    room = ((0, 0), (0, 0), (0, h.shape[1]), (0, 0))
    queries = jnp.broadcast_to(rows + jnp.arange(h.shape[1]), h.shape[:2])
    mask = visible(full, queries)
    rope = rope_table(full.position[:, rows:], config.rope_frequencies(), full.shape[1])
    for layer in range(config.num_layers):
        h = jnp.concatenate([h[:, :p], before(deep[layer], h[:, p + d :])], axis=1)

        def as_cache(x, h=h):
            heads = x.reshape(rows, config.num_kv_heads, config.head_dim).swapaxes(0, 1)
            return jnp.pad(jnp.broadcast_to(heads, (len(h), *heads.shape)), room)

        cache = LayerCache(as_cache(kv["k"][layer]), as_cache(kv["v"][layer]))
        h, _ = at(model.llm.blocks, layer)(h, rope, mask, no_hooks, cache, rows)
    return model.llm.norm(h[:, p + d :])


@jax.jit
def vision_by_hand(model, pixels) -> jax.Array:
    """Features under deep and shallow tokens, which here stand after all the others."""
    vision, no_hooks = model.vision, TowerHooks().layer([], 0)
    deep = content(model, "vpt", "vision.block.in")["embedding"]
    shallow = content(model, "vpt_2", "vision.embed")["embedding"]
    h = vision.embed(pixels)
    tokens = h.shape[1]
    h = jnp.concatenate([h, jnp.broadcast_to(shallow, (len(h), *shallow.shape))], axis=1)
    for layer in range(vision.config.used_layers):
        own = jnp.broadcast_to(deep[layer], (len(h), *deep.shape[1:]))
        h, _ = at(vision.blocks, layer)(
            jnp.concatenate([h, own], axis=1), None, None, no_hooks, None, None
        )
        h = h[:, : tokens + len(shallow)]
    return h[:, vision.config.first_feature : tokens]


@pytest.fixture(scope="module")
def model() -> MLLM:
    return noisy(EVERY)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny_batch()


@pytest.fixture(scope="module")
def expected(model, batch) -> np.ndarray:
    return np.asarray(model.llm.logits(decoder_by_hand(model, batch)))


def test_virtual_tokens_of_the_llm_equal_a_loop_over_bare_blocks(model, batch, expected):
    valid = np.asarray(batch.layout.kind) != TokenKind.PAD
    got = np.asarray(forward(model, batch))
    np.testing.assert_allclose(got[valid], expected[valid], atol=1e-5)
    assert np.abs(got - np.asarray(forward(tiny_model(), batch)))[valid].max() > 0.1


@pytest.mark.parametrize("class_token", [False, True])
def test_virtual_tokens_of_the_vision_encoder_equal_a_loop_over_bare_blocks(class_token):
    shape = TINY_VISION | {"num_layers": 3, "class_token": class_token}
    config = dataclasses.replace(tiny_config(), vision=VisionConfig(**shape))
    model = initialize(MLLM(config, "vpt:length=2/vpt:deep=false,length=3"), 0)
    batch = tiny_batch()
    hooks = model.tuning.hooks(batch).tower("vision")
    pixels = jnp.asarray(batch.pixels[:, 0])
    got, bare = jax.jit(lambda vision, x: (vision(x, hooks), vision(x)))(model.vision, pixels)
    assert got.shape == (2, config.visual_tokens, 8)
    np.testing.assert_allclose(got, vision_by_hand(model, pixels), atol=1e-5)
    assert np.abs(got - bare).max() > 1e-2


def test_every_virtual_token_learns_with_and_without_remat_and_unrolling(batch):
    found = []
    for otherwise in (False, True):
        model = noisy(EVERY, remat=otherwise, unroll=otherwise)
        graphdef, trainable, frozen = split_model(model)

        @jax.jit
        def gradients(trainable, frozen, batch, graphdef=graphdef):
            def loss(trainable):
                return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

            return jax.grad(loss)(trainable)

        found.append(nnx.to_flat_state(gradients(trainable, frozen, batch)))
    assert len(found[0]) == 6  # a prefix has two
    for (path, a), (_, b) in zip(*found, strict=True):
        a, b = np.asarray(a[...]), np.asarray(b[...])
        layers = a.reshape(len(a), -1) if ".block." in path[3] else a.reshape(1, -1)
        assert (np.abs(layers).max(1) > 1e-6).all(), path
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_packed_document_sees_the_virtual_tokens(model):
    runs = [(TokenKind.SYSTEM, 1), (TokenKind.QUESTION, 3), (TokenKind.ANSWER, 2)]
    first, second = row_layout(*runs), row_layout(*runs[1:])
    second["document"] = second["document"] + 1
    tokens = np.random.default_rng(0).integers(1, 29, (1, 11)).astype(np.int32)
    packed = {name: np.concatenate([first[name], second[name]]) for name in first}
    together = forward(model, Batch(tokens, stack_layout([packed])))
    second |= {name: np.pad(x, (0, 1)) for name, x in second.items()}
    rows = np.stack([tokens[0, :6], np.pad(tokens[0, 6:], (0, 1))])
    apart = forward(model, Batch(rows, stack_layout([first, second])))
    np.testing.assert_allclose(together[0, :6], apart[0], atol=1e-5)
    np.testing.assert_allclose(together[0, 6:], apart[1, :5], atol=1e-5)


# Generation


def prompts(left: bool, new=()) -> Batch:
    """Two prompts of different lengths, padded on one side, each followed by `new` tokens."""
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((2, 1, 12, 12, 3)).astype(np.float32)
    rows, tokens = [], []
    for number in range(2):
        runs = [(TokenKind.SYSTEM, 2), (TokenKind.IMAGE, 9), (TokenKind.QUESTION, 3 - 2 * number)]
        row = row_layout(*runs, length=14, left=left)
        # The tokens themselves stand at the same places among those that are not padding.
        words = np.roll(rng.integers(1, 29, 14), -2 * number * (not left))
        if len(new):
            end = {"kind": TokenKind.ANSWER, "image": -1}
            size, last = len(new[number]), row["position"].max()
            for name in row:
                added = np.full(size, int(end.get(name, 0)))
                if name == "position":
                    added = last + 1 + np.arange(size)
                row[name] = np.concatenate([row[name], added]).astype(np.int32)
            words = np.concatenate([words, new[number]])
        rows.append(row)
        tokens.append(words)
    return Batch(np.stack(tokens).astype(np.int32), stack_layout(rows), pixels)


@pytest.mark.parametrize(
    ("spec", "llm"),
    [
        ("prefix:length=3", {"attention_pattern": "lg", "window": 6}),
        ("aprompt:length=2,kv_length=3/prompt:length=1/vpt:length=2/mores", {}),
    ],
)
def test_decoding_says_what_teacher_forcing_says(spec, llm):
    model = noisy(spec, **llm)
    engine, said = Engine(model, eos_ids=(99,)), []
    for left in (False, True):
        new = np.asarray(engine.generate(prompts(left), NEW).tokens)
        logits = np.asarray(forward(model, prompts(left, new)))
        for row in range(2):
            last = 13 if left or not row else 11
            places = [last, *range(14, 14 + NEW - 1)]
            np.testing.assert_array_equal(logits[row, places].argmax(-1), new[row])
        said.append(new)
    np.testing.assert_array_equal(*said)


@pytest.mark.parametrize("spec", ["prefix:length=3", "prompt:length=3", "vpt/ptum:length=3"])
def test_the_decode_program_is_the_bare_one_of_a_longer_prompt(spec):
    tuned = Engine(tiny_model(spec), eos_ids=(2,)).lower_decode(tiny_batch(answer=0), 4)
    bare = Engine(tiny_model(), eos_ids=(2,)).lower_decode(tiny_batch(answer=3), 4)
    assert tuned.as_text() == bare.as_text()


# With other things


def test_text_alone_is_as_without_virtual_tokens_in_the_vision_encoder():
    batch = tiny_batch(images=0)
    with_virtual_tokens, bare = (
        forward(tiny_model(s), batch) for s in ("vpt/vpt:deep=false", "none")
    )
    np.testing.assert_array_equal(with_virtual_tokens, bare)


def test_edits_pass_over_the_virtual_tokens(batch):
    spec = "vpt:length=2/ptum:length=3/prefix/red/red:site=vision.block.out"
    hooks = tiny_model(spec).tuning.hooks(batch)
    layout = np.asarray(batch.layout.kind)
    for tower, extra, tokens in (("vision", 2, np.ones((2, 9), bool)), ("llm", 3, layout != 0)):
        edits = [i for s, i in hooks._items if isinstance(i, AttachedEdit) and s.startswith(tower)]
        (mask,) = (edit.mask for edit in edits)
        np.testing.assert_array_equal(mask, np.pad(tokens, ((0, 0), (extra, 0))))


def test_probes_see_the_learned_keys(model, batch):
    queries = np.asarray([[3, 12], [5, 13]])

    @jax.jit
    def maps(model, batch):
        reads = {"probes": (AttentionMaps(),)}
        every, some = model(batch, **reads), model(batch, queries=queries, **reads)
        return every.stats["maps"], some.stats["maps"]

    every, some = maps(model, batch)
    extra, keys = (
        model.tuning.num_extra_tokens,
        model.tuning.num_virtual_tokens + batch.layout.shape[1],
    )
    assert (extra, keys) == (3, 5 + 18)
    assert some.shape == (3, 2, 2, keys)
    np.testing.assert_allclose(some.sum(-1), 1, atol=1e-5)
    assert (np.asarray(some)[..., :2] > 0).all()
    chosen = np.take_along_axis(np.asarray(every), (queries + extra)[None, :, :, None], axis=2)
    np.testing.assert_allclose(some, chosen, atol=1e-6)


def test_the_parts_of_m2pt():
    model = tiny_model("m2pt:visual_length=2,length=3")
    assert model.tuning.spec == "vpt:length=2,init=xavier/ptum:length=3/partial"
    _, trainable, _ = split_model(model)
    trained = {".".join(map(str, path[:2])) for path, _ in nnx.to_flat_state(trainable)}
    assert trained == {"tuning.params", "connector.layers", "llm.head"}


def test_uniform_starts_fill_their_interval():
    model = tiny_model("vpt:length=40/vpt:length=40,init=xavier/ptum:length=40")
    bounds = {"vpt": 6 / (3 * 16 + 8), "vpt_2": 6 / (40 + 8), "ptum": 6 / (40 + 16)}
    for key, bound in bounds.items():
        (variables,) = model.tuning.params[key].values()
        largest = np.abs(variables["embedding"][...]).max()
        assert 0.95 * bound**0.5 < largest <= bound**0.5


def test_qlora_is_lora_over_an_llm_in_eight_bits():
    eight = dataclasses.replace(tiny_config().llm, int8=True)
    tuning = Tuning("qlora:rank=3", dataclasses.replace(tiny_config(), llm=eight))
    assert tuning.methods == (("lora", LoRA(rank=3)),)
    with pytest.raises(UserError, match=r"eight bits \(quantize=int8\)"):
        Tuning("qlora:rank=3", tiny_config())


def test_what_cannot_be_is_refused():
    plain = tiny_config()
    tied = tiny_config(tie_embeddings=True)
    blind = dataclasses.replace(plain, vision=None)
    for config, spec, message in (
        (plain, "prefix:length=0", "prefix:length must be at least 1, got 0"),
        (plain, "vpt:init=zero", "unknown value of vpt:init 'zero'.*patch, xavier"),
        (plain, "partial:train=llm", "unknown part in partial:train 'llm'.*connector, lm_head"),
        (blind, "vpt", "vpt needs one vision encoder; this model has none"),
        (blind, "m2pt", "vpt needs one vision encoder"),
        (tied, "partial", "this model has no lm_head"),
    ):
        with pytest.raises(UserError, match=message):
            Tuning(spec, config)
