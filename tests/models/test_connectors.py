"""Connectors: the maths, exact sizes, token counts, gradients through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from linkers import TINY_QFORMER, TINY_RESAMPLER, TOLERANCE, features, parameters, randomised
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind
from moresjax.core.parameter_names import path_name
from moresjax.models.connector import build_connector, connector_tokens
from moresjax.models.count import count_parameters
from moresjax.models.decoder import DecoderConfig
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.models.zoo import mllm_config
from moresjax.testing.batches import row_layout, stack_layout
from moresjax.testing.models import TINY_LLM, TINY_VISION, tiny_config
from moresjax.training.objectives import next_token

# The maths


def test_fused_gelu_mlp():
    connector = randomised(build_connector("fused-gelu-mlp", 6, 10))
    p = {k: torch.tensor(x) for k, x in parameters(connector).items()}
    assert [tuple(p[f"layers.{i}.kernel"].shape) for i in range(3)] == [(6, 24), (24, 10), (10, 10)]
    y = torch.tensor(features())
    for i in range(3):
        y = F.gelu(y) if i else y
        y = y @ p[f"layers.{i}.kernel"] + p[f"layers.{i}.bias"]
    np.testing.assert_allclose(connector(jnp.asarray(features())), y, atol=TOLERANCE)


def test_mof_mlp_has_a_branch_for_each_encoder():
    connector = randomised(build_connector("mof_mlp", 6, 10))
    x = jnp.asarray(features(8))
    y = np.asarray(connector(x))
    assert y.shape == (3, 8, 10)
    for i, branch in enumerate(connector.branches):
        assert len(branch.layers) == 2
        np.testing.assert_allclose(y[:, i::2], branch(x[:, i::2]), atol=1e-6)
    assert np.abs(connector.branches[0](x) - connector.branches[1](x)).max() > 0.1


@pytest.mark.parametrize("tail", ["linear", "mlp2x_gelu"])
def test_neighbours_are_put_side_by_side(tail):
    joining = randomised(build_connector(f"concat4-{tail}", 6, 10))
    plain = build_connector(tail, 24, 10)
    nnx.update(plain, nnx.state(joining))
    x = features(8)
    y = np.asarray(joining(jnp.asarray(x)))
    assert y.shape == (3, 2, 10)
    expected = plain(jnp.asarray(torch.tensor(x).view(3, 2, 24).numpy()))
    np.testing.assert_allclose(y, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["concat1-linear", "concat4-identity", "concat4-mof_mlp"])
def test_what_cannot_follow_neighbours(name):
    with pytest.raises(UserError, match="connector"):
        connector_tokens(name, 8)


def test_neighbours_must_divide_the_features():
    config = tiny_config()
    message = "connector concat4-linear joins 4 visual features to a token; 9 features"
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, connector="concat4-linear")


# Sizes


def test_full_size_qformer():
    """BERT-base with cross-attention in every second layer, 128 queries and a linear."""
    with torch.device("meta"):
        oracle = Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=1024))
    expected = sum(x.numel() for x in oracle.parameters()) + 128 * 768 + 769 * 4096
    report = count_parameters(mllm_config("vicuna-7b", "clip-l-14-336", "qformer"))
    assert report.components["connector"].total == expected == 104_846_848


@pytest.mark.parametrize(
    ("llm", "vision", "connector", "expected"),
    [
        ("vicuna-7b", "clip-l-14-336", "linear", 1025 * 4096),
        ("phi-2", "siglip-so400m-14-384", "mlp2x_gelu", 9_507_840),
        ("vicuna-7b", "mof-l-14-336", "mof_mlp", 2 * 20_979_712),
        ("llama-2-7b", "eva-g-14-448", "concat4-linear", (4 * 1408 + 1) * 4096),
        (
            "vicuna-7b",
            "dinov2-siglip-so400m-14-384",
            "fused-gelu-mlp",
            2177 * 8704 + 8705 * 4096 + 4097 * 4096,
        ),
        (
            "phi-2",
            "siglip-so400m-14-384",
            "resampler",
            # projection, latents, final norm; layers: q k v o, MLP x4, three norms
            1153 * 2560 + 128 * 2560 + 5120 + 3 * (4 * 2560 * 512 + 8 * 2560**2 + 6 * 2560),
        ),
    ],
)
def test_connector_sizes(llm, vision, connector, expected):
    report = count_parameters(mllm_config(llm, vision, connector))
    assert report.components["connector"].total == report.trainable == expected


def test_identity_has_no_parameters():
    config = tiny_config()
    config = dataclasses.replace(
        config, connector="identity", vision=VisionConfig(**(TINY_VISION | {"hidden_size": 16}))
    )
    assert "connector" not in count_parameters(config).components


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("identity", 729),
        ("mlp2x_gelu", 729),
        ("fused-gelu-mlp", 729),
        ("concat3-mlp2x_gelu", 243),
        ("mof_mlp", 729),
        ("resampler", 128),
        ("qformer", 128),
        ("resampler:latents=64", 64),
        ("qformer:latents=32,layers=6", 32),
    ],
)
def test_visual_tokens(name, tokens):
    assert connector_tokens(name, 729) == tokens


# The whole model


def model_with(connector: str, **llm) -> MLLM:
    vision = VisionConfig(**TINY_VISION)
    if connector == "mof_mlp":
        vision = FusedVisionConfig(encoders=(vision, vision))
    if connector == "identity":
        vision = dataclasses.replace(vision, hidden_size=16, head_dim=8)
    llm = DecoderConfig(**(TINY_LLM | llm))
    return initialize(MLLM(MLLMConfig(llm=llm, vision=vision, connector=connector)))


def batch_for(model: MLLM) -> Batch:
    """Two rows: an image, a question and an answer."""
    visual = model.config.visual_tokens
    pieces = [(TokenKind.SYSTEM, 2), (TokenKind.IMAGE, visual), (TokenKind.QUESTION, 3)]
    layout = stack_layout([row_layout(*pieces, (TokenKind.ANSWER, 4))] * 2, visual)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, TINY_LLM["vocab_size"], layout.shape).astype(np.int32)
    return Batch(tokens, layout, rng.standard_normal((2, 1, 12, 12, 3)).astype(np.float32))


@pytest.mark.parametrize(
    ("connector", "tokens"),
    [
        ("linear", 9),
        ("fused-gelu-mlp", 9),
        ("mof_mlp", 18),
        (TINY_RESAMPLER, 5),
        (TINY_QFORMER, 5),
    ],
)
def test_gradients_reach_every_parameter(connector, tokens):
    model = model_with(connector, num_layers=1)
    assert model.config.visual_tokens == tokens
    batch = batch_for(model)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(part):
        return next_token(nnx.merge(graphdef, nnx.State({**state, "connector": part})), batch).total

    flat = nnx.to_flat_state(gradient(state.connector))
    found = {path_name(path): np.abs(np.asarray(x.get_value())).max() for path, x in flat}
    assert set(found) == set(parameters(model.connector))
    # A bias of the keys moves all logits of a query alike: the softmax does not see it.
    blind = {name for name in found if name.endswith(".k.bias")}
    assert bool(blind) == connector.startswith("qformer")
    for name, size in found.items():
        assert (size < 1e-6) if name in blind else (size > 1e-6), (name, size)


def test_identity_in_the_whole_model():
    model = model_with("identity")
    batch = batch_for(model)
    features = model.vision(jnp.asarray(batch.pixels[:, 0]))
    hooks = model.tuning.hooks(batch)
    np.testing.assert_array_equal(model.visual_features(jnp.asarray(batch.pixels), hooks), features)


@pytest.mark.parametrize("connector", [TINY_RESAMPLER, TINY_QFORMER])
def test_unrolling_does_not_change_the_model(connector):
    models = [model_with(connector, unroll=unroll) for unroll in (False, True)]
    batch = batch_for(models[0])
    assert models[1].connector.unroll == 2 != models[0].connector.unroll
    scanned, unrolled = (jax.jit(lambda m: m(batch).hidden)(model) for model in models)
    np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-5)


def test_the_connector_takes_tuning_at_its_tokens():
    """`image` at `connector.out` selects what the resampler gives, not what it reads."""
    config = model_with(TINY_RESAMPLER).config
    model = initialize(MLLM(config, "mores:rank=1,positions=image:f1,site=connector.out"))
    plain = initialize(MLLM(config))
    batch = batch_for(model)
    pixels = jnp.asarray(batch.pixels)
    tuned, untuned = (m.visual_features(pixels, m.tuning.hooks(batch)) for m in (model, plain))
    moved = np.abs(np.asarray(tuned - untuned)).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(moved, [True] + [False] * 4)


# Bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp", "unknown connector 'mlp'; choose from: identity, linear.*mof_mlp, resampler, qf"),
        ("fused_gelu_mlp", "unknown connector.*fused-gelu-mlp"),
        ("linear:bias=1", "unknown connector 'linear:bias=1'"),
        ("resampler:queries=3", "option of connector resampler 'queries'; .*: latents, layers"),
        ("resampler:latents=0", "latents must be a positive integer, got '0'"),
        ("qformer:latents", "latents must be a positive integer, got ''"),
        ("qformer:", "option of connector qformer ''"),
        ("qformer:layers=3", "layers=3 is not a multiple of cross_every=2"),
        ("mlp1000000000x_gelu", "unknown connector 'mlp1000000000x_gelu'"),
        ("concat1000000000-linear", "unknown connector"),
        ("resampler:layers=999999999", "layers must be at least 1 and at most 256"),
        ("qformer:latents=99999", "latents must be at least 1 and at most 65,536"),
        ("resampler:latents=" + "9" * 5000, "latents must be a positive integer"),
        ("qformer:heads=7", "width=768 is not a multiple of heads=7"),
    ],
)
def test_bad_names(name, message):
    for make in (
        lambda: build_connector(name, 4, 4),
        lambda: MLLMConfig(llm=DecoderConfig(**TINY_LLM), connector=name),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_connectors_that_do_not_fit():
    config = tiny_config()
    with pytest.raises(UserError, match="has 8 features, the LLM 16"):
        dataclasses.replace(config, connector="identity")
    with pytest.raises(UserError, match="mof_mlp needs two vision encoders"):
        dataclasses.replace(config, connector="mof_mlp")
    both = FusedVisionConfig(encoders=(config.vision, config.vision), fusion="channels")
    with pytest.raises(UserError, match="mof_mlp needs two vision encoders"):
        dataclasses.replace(config, vision=both, connector="mof_mlp")
