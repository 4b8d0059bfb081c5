"""Attention statistics: against transformers' own attention maps, and the invariants of LMAR."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moresjax.analysis.attention import (
    TEXT_VARIANTS,
    AttentionMaps,
    AttentionProbe,
    summarize,
    to_grid,
)
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind, visible
from moresjax.generation.engine import Engine
from moresjax.inference.analyze import attention, attention_map
from moresjax.inference.attention_maps import answer_maps, token_attention
from moresjax.models.attention import GROUPS
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.models.zoo import mllm_config
from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.models import TINY_LLM, talking_model, tiny_config, tiny_model
from moresjax.tuning.probes import ProbeContext
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import build_mllm, import_params

NEW = 5


def generate(model, batch):
    engine = Engine(model, eos_ids=(-1,), probes=(AttentionProbe(),))  # never ends by itself
    generation = engine.generate(batch, NEW)
    return generation, {k: np.asarray(v) for k, v in generation.stats["attention"].items()}


def prompt(**options) -> Batch:
    return tiny_batch(answer=0, **options)


def with_answers(batch: Batch, tokens) -> tuple[Batch, np.ndarray]:
    """The prompt rows followed by generated tokens, and the queries that gave those tokens."""
    count = tokens.shape[1]
    rows, layout = len(tokens), batch.layout
    last = np.asarray(layout.position).max(1, keepdims=True)
    ahead = np.arange(count)[None]

    def join(old, new):
        new = np.broadcast_to(new, (rows, count)).astype(np.int32)
        return np.concatenate([np.asarray(old), new], axis=1)

    whole = layout.replace(
        kind=join(layout.kind, int(TokenKind.ANSWER)),
        image=join(layout.image, -1),
        position=join(layout.position, last + 1 + ahead),
        document=join(layout.document, 0),
        branch=join(layout.branch, 0),
    )
    queries = np.broadcast_to(layout.shape[1] - 1 + ahead, (rows, count)).astype(np.int32)
    return dataclasses.replace(batch, tokens=join(batch.tokens, tokens), layout=whole), queries


@pytest.mark.parametrize("spec", ["none", "mores:rank=2,positions=image", "prompt:length=2"])
def test_statistics_while_generating_equal_one_teacher_forced_pass(spec):
    model, batch = tiny_model(spec), prompt()
    generation, found = generate(model, batch)
    whole, queries = with_answers(batch, np.asarray(generation.tokens))
    forced = model(whole, probes=(AttentionProbe(),), queries=queries).stats["attention"]
    for name, value in found.items():
        np.testing.assert_allclose(value, forced[name], atol=2e-5)
    # Every layer is there, the last one included.
    assert found["mass"].shape == (3, 2, 4, len(GROUPS))


def test_masses_sum_to_one_per_token():
    _, found = generate(tiny_model(), prompt())
    np.testing.assert_allclose(found["mass"].sum(-1), NEW, atol=1e-5)


def test_uniform_attention_has_an_lmar_of_one_in_every_layer_and_variant():
    model = tiny_model()
    kernel = model.llm.blocks.attn.q.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    generation, found = generate(model, prompt())
    summary = summarize(
        found["mass"], found["score"], np.asarray(generation.length), np.ones(2, bool)
    )
    for name in TEXT_VARIANTS:
        np.testing.assert_allclose(summary.lmar[name], 1.0, atol=1e-5)
        np.testing.assert_allclose(summary.lmar_of_means[name], 1.0, atol=1e-5)
    # 9 of the 14 to 18 visible keys are the image's.
    expected = np.mean([9 / n for n in range(14, 14 + NEW)])
    np.testing.assert_allclose(summary.share[:, GROUPS.index(TokenKind.IMAGE)], expected, atol=1e-5)
    np.testing.assert_allclose(summary.share.sum(-1), 1, atol=1e-5)


def test_raising_the_visual_logits_raises_lmar():
    layout = stack_layout(
        [row_layout((TokenKind.SYSTEM, 1), (TokenKind.IMAGE, 9), (TokenKind.ANSWER, 3))]
    )
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 13, 8)).astype(np.float32)
    k = rng.standard_normal((1, 2, 13, 8)).astype(np.float32)
    q[..., 0] = 1
    queries = np.asarray([[10, 11, 12]], np.int32)
    context = ProbeContext(jnp.asarray(layout.kind), visible(layout, queries), jnp.asarray(queries))
    ratios = []
    for boost in (0.0, 2.0, 4.0):
        raised = k.copy()
        raised[..., 0] += boost * (np.asarray(layout.kind)[:, None] == TokenKind.IMAGE)
        stats = AttentionProbe().read(context, q=jnp.asarray(q), k=jnp.asarray(raised))
        stats = {name: np.asarray(x)[None] for name, x in stats.items()}
        summary = summarize(stats["mass"], stats["score"], np.asarray([3]), np.ones(1, bool))
        ratios.append([summary.lmar[name][0] for name in ("text", "all_nonvisual")])
    assert (np.diff(ratios, axis=0) > 0).all()


def test_rows_do_not_depend_on_padding_or_on_each_other():
    model, batch = tiny_model(), prompt(rows=2)
    together = generate(model, batch)[1]
    for row in range(2):
        part = dataclasses.replace(
            batch,
            tokens=batch.tokens[row : row + 1],
            layout=batch.layout.replace(
                **{
                    f: np.asarray(getattr(batch.layout, f))[row : row + 1]
                    for f in ("kind", "image", "position", "document", "branch")
                }
            ),
            pixels=batch.pixels[row : row + 1],
        )
        alone = generate(model, part)[1]
        # The same row, padded on the left and on the right.
        for left in (True, False):
            pad = ((0, 0), (3, 0) if left else (0, 3))
            fill = {"image": -1}
            layout = part.layout.replace(
                **{
                    f: np.pad(getattr(part.layout, f), pad, constant_values=fill.get(f, 0))
                    for f in ("kind", "image", "position", "document", "branch")
                }
            )
            padded = dataclasses.replace(part, tokens=np.pad(part.tokens, pad), layout=layout)
            moved = generate(model, padded)[1]
            for name in alone:
                np.testing.assert_allclose(moved[name], alone[name], atol=2e-5)
        for name in alone:
            np.testing.assert_allclose(together[name][:, row], alone[name][:, 0], atol=2e-5)


def test_masses_and_maps_are_those_of_transformers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_LLM["vocab_size"],
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).eval()
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    ours = dataclasses.replace(tiny_config(), llm=decoder_config(config.to_dict()), vision=None)
    state = import_params(ours, config.to_dict(), tensors)
    model = build_mllm(ours, state)
    pieces = [
        (TokenKind.SYSTEM, 2),
        (TokenKind.IMAGE, 4),
        (TokenKind.QUESTION, 3),
        (TokenKind.ANSWER, 3),
    ]
    layout = stack_layout([row_layout(*pieces)], visual=4)
    tokens = np.random.default_rng(0).integers(0, 29, (1, 12)).astype(np.int32)
    queries = np.asarray([[8, 9, 10]], np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), output_attentions=True).attentions
    expected = np.stack([x.numpy()[0] for x in expected])[:, :, queries[0]]  # [L, N, Q, S]
    stats = model(
        Batch(tokens, layout), probes=(AttentionProbe(), AttentionMaps()), queries=queries
    )
    np.testing.assert_allclose(stats.stats["maps"][:, 0], expected.mean(1), atol=1e-5)
    kind = np.asarray(layout.kind)[0]
    masses = np.stack([expected[..., kind == g].sum((2, 3)) for g in GROUPS], axis=-1)
    np.testing.assert_allclose(stats.stats["attention"]["mass"][:, 0], masses, atol=1e-5)
    # Scores: the mean over the visible keys of each group, query by query.
    visible_keys = np.tril(np.ones((12, 12), bool))[queries[0]]

    def mean(groups):
        member = np.isin(kind, [int(g) for g in groups])
        return (expected * member).sum(-1) / (visible_keys * member).sum(-1)

    image, *texts = [(TokenKind.IMAGE,), *TEXT_VARIANTS.values()]
    scores = np.stack([mean(groups).sum(-1) for groups in (image, *texts)], axis=-1)
    np.testing.assert_allclose(stats.stats["attention"]["score"][:, 0], scores, atol=1e-5)


def test_samples_without_image_or_answer_are_excluded_and_counted():
    mass = np.ones((3, 4, 2, len(GROUPS)))
    score = np.ones((3, 4, 2, 1 + len(TEXT_VARIANTS)))
    mass[:, 2:], score[:, 2:] = np.nan, np.nan
    tokens, has_image = np.asarray([1, 2, 0, 3]), np.asarray([True, True, True, False])
    summary = summarize(mass, score, tokens, has_image)
    assert (summary.samples, summary.excluded) == (2, 2)
    assert np.isfinite(summary.share).all()
    data = summary.to_dict()
    assert data["groups"] == ["system", "image", "question", "answer"]


def test_one_sample_that_ignores_its_text_blows_up_the_mean_of_ratios_only():
    score = np.ones((1, 2, 1, 1 + len(TEXT_VARIANTS)))
    score[0, 1, 0, 1:] = 1e-6
    mass = np.ones((1, 2, 1, len(GROUPS)))
    summary = summarize(mass, score, np.ones(2), np.ones(2, bool))
    assert summary.lmar["text"][0] > 1e5
    assert summary.lmar_of_means["text"][0] == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "tokens", "missing"),
    [
        ({}, 9, []),
        ({"class_token": True}, 9, []),
        ({"class_token": True, "select": "cls_patch"}, 10, []),
        ({"drop_first_token": True}, 8, [0]),
    ],
)
def test_visual_tokens_go_back_to_their_patches(changes, tokens, missing):
    config = VisionConfig(
        image_size=12,
        patch_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        **changes,
    )
    assert config.num_tokens == tokens
    # Patch p has the value p; a class token has -1.
    values = np.arange(9.0)[len(missing) :]
    values = np.concatenate([[-1.0] * (tokens - len(values)), values])
    llm = tiny_config().llm
    grid = to_grid(values[None], MLLMConfig(llm=llm, vision=config))[0]
    assert grid.shape == (3, 3)
    flat = grid.ravel()
    assert np.isnan(flat[missing]).all()
    kept = [i for i in range(9) if i not in missing]
    np.testing.assert_array_equal(flat[kept], np.asarray(kept, float))


def test_two_tokens_of_a_patch_are_added_and_queries_have_no_place():
    llm, encoder = tiny_config().llm, tiny_config().vision
    pair = FusedVisionConfig(encoders=(encoder, encoder), fusion="interleave")
    grid = to_grid(np.arange(18.0)[None], MLLMConfig(llm=llm, vision=pair))[0]
    np.testing.assert_array_equal(grid.ravel(), np.arange(9) * 4.0 + 1)
    side_by_side = FusedVisionConfig(encoders=(encoder, encoder), fusion="channels")
    grid = to_grid(np.arange(9.0)[None], MLLMConfig(llm=llm, vision=side_by_side))[0]
    np.testing.assert_array_equal(grid.ravel(), np.arange(9.0))
    querying = MLLMConfig(llm=llm, vision=encoder, connector="resampler:latents=9")
    with pytest.raises(UserError, match="connector resampler:latents=9 come from learned queries"):
        to_grid(np.arange(9.0)[None], querying)


def test_tokens_of_joined_patches_are_parts_of_rows():
    """Patch p has the value p, a token the mean of its patches: they lie where its patches lie."""
    llm = tiny_config().llm
    fields = {"patch_size": 2, "hidden_size": 8, "intermediate_size": 8}
    encoder = VisionConfig(image_size=8, num_layers=1, num_heads=1, **fields)
    values = np.arange(16.0).reshape(8, 2).mean(-1)
    grid = to_grid(values, MLLMConfig(llm=llm, vision=encoder, connector="concat2-linear"))
    np.testing.assert_array_equal(grid, np.arange(16.0).reshape(4, 2, 2).mean(-1))
    pair = FusedVisionConfig(encoders=(encoder, encoder), fusion="interleave")
    config = MLLMConfig(llm=llm, vision=pair, connector="concat4-linear")
    np.testing.assert_array_equal(to_grid(values, config), grid)
    assert to_grid(np.arange(256.0), mllm_config("minigpt-v2")).shape == (32, 8)
    across = MLLMConfig(llm=llm, vision=encoder, connector="concat8-linear")
    with pytest.raises(UserError, match="go over the ends of its 4 rows of patches"):
        to_grid(np.arange(2.0), across)
    whole = dataclasses.replace(encoder, class_token=True, select="cls_patch", image_size=6)
    joined = MLLMConfig(llm=llm, vision=whole, connector="concat2-linear")
    with pytest.raises(UserError, match="go over the ends of its 3 rows"):
        to_grid(np.arange(5.0), joined)


def test_a_map_of_two_images_has_a_grid_for_each():
    model, rng = talking_model("prompt:length=2"), np.random.default_rng(0)
    images = list(rng.integers(0, 255, (2, 12, 12, 3)).astype(np.uint8))
    found = attention_map(model, "<image> is it <image> ?", images, max_new_tokens=3)
    row = model.prompts.row("<image> is it <image> ?", images)
    assert found.grids.shape == (2, 2, len(found.tokens), 3, 3)
    # The first new token is predicted by the prompt's last.
    batch = model.service.batch([row], len(row))
    maps = model.mllm(batch, probes=(AttentionMaps(),), queries=[[len(row) - 1]]).stats["maps"]
    for number, grid in enumerate(found.grids):
        own = 2 + np.flatnonzero((row.image >= 9 * number) & (row.image < 9 * (number + 1)))
        expected = np.asarray(maps)[:, 0, 0, own].reshape(2, 3, 3)
        np.testing.assert_allclose(grid[:, 0], expected, atol=1e-5)
    # Head by head, of one token: the mean over heads is the map.
    tokens = np.asarray(model.service.generate_rows([row], 3).tokens)[0, : len(found.tokens)]
    by_head = answer_maps(model, row, tokens, places=[1])
    assert by_head.shape == (2, 2, 4, 1, 3, 3)
    np.testing.assert_allclose(by_head.mean(2)[:, :, 0], found.grids[:, :, 1], atol=1e-6)
    assert np.ptp(by_head, axis=2).max() > 1e-3  # heads differ
    # Token by token: their means are what is summed up over an answer.
    each = token_attention(model, row, tokens)
    np.testing.assert_allclose(each.grids, found.grids, atol=1e-6)
    whole = attention(model, "<image> is it <image> ?", images, max_new_tokens=3)
    image = GROUPS.index(TokenKind.IMAGE)
    np.testing.assert_allclose(each.share.mean(0), whole.share[:, image], atol=1e-5)
    longer = row.append(tokens)
    batch, query = model.service.batch([longer], len(longer)), len(row)  # of the second token
    maps = model.mllm(batch, probes=(AttentionMaps(),), queries=[[query]]).stats["maps"]
    image, text = (
        np.asarray(maps)[:, 0, 0, [2 + n for n in range(query + 1) if longer.kind[n] in kinds]]
        for kinds in ([TokenKind.IMAGE], [TokenKind.QUESTION, TokenKind.ANSWER])
    )
    looked = text.sum(1) > 0
    assert looked.any()
    expected = image.mean(1)[looked] / text.mean(1)[looked]
    np.testing.assert_allclose(each.lmar[1][looked], expected, rtol=1e-4)
    assert np.isnan(each.lmar[1][~looked]).all()
    with pytest.raises(UserError, match="an answer of 3 tokens has no tokens"):
        answer_maps(model, row, tokens[:3], places=[3])
    with pytest.raises(UserError, match="needs an image"):
        answer_maps(model, model.prompt("is it ?"), tokens)
    with pytest.raises(UserError, match="the map is of 2 images"):
        _ = found.grid
    with pytest.raises(UserError, match="needs an image"):
        attention_map(model, "is it ?", [])
    with pytest.raises(UserError, match="an image has 9 visual tokens, got 18 values"):
        to_grid(np.arange(18.0)[None], model.config)
