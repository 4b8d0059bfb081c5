"""The modules: ways to run the layers, initialisation, connectors, the composition, sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenLayout, visible
from moresjax.core.parameter_names import path_name
from moresjax.models.connector import Connector
from moresjax.models.count import count_parameters
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.initialize import abstract_params, initialize, set_params
from moresjax.models.layers import Norm, param
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import PatchClassifier, VisionConfig, VisionEncoder, patchify
from moresjax.models.zoo import LLMS, VISION, mllm_config
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import TINY_LLM, TINY_VISION, tiny_config, tiny_model


def model_with(llm: dict | None = None, vision: dict | None = None, seed: int = 0) -> MLLM:
    config = tiny_config(**(llm or {}))
    config = dataclasses.replace(config, vision=VisionConfig(**(TINY_VISION | (vision or {}))))
    return initialize(MLLM(config), seed)


@jax.jit
def hidden_states(model: MLLM, batch):
    return model(batch).hidden


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path_name(path): np.asarray(x.get_value()) for path, x in flat}


def assert_close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# Ways to run the layers


@pytest.fixture(scope="module")
def reference():
    batch = tiny_batch()
    return batch, hidden_states(tiny_model(), batch)


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": True}])
def test_scan_options_do_not_change_the_output(reference, options):
    batch, expected = reference
    assert_close(hidden_states(model_with(options, options), batch), expected)


def test_list_of_blocks_gives_the_same_output(reference):
    batch, expected = reference
    model = tiny_model()
    model.llm.unstack()
    assert isinstance(model.llm.blocks, nnx.List)
    assert len(model.llm.blocks) == TINY_LLM["num_layers"]
    assert_close(hidden_states(model, batch), expected)


def test_caches_do_not_depend_on_the_way(reference):
    batch, _ = reference
    stacked, listed = tiny_model(), tiny_model()
    listed.llm.unstack()
    run = jax.jit(lambda model, batch: model(batch, keep_cache=True).cache)
    caches = run(stacked, batch), run(listed, batch)
    assert len(caches[0]) == len(caches[1]) == TINY_LLM["num_layers"]
    jax.tree.map(assert_close, *caches)
    assert caches[0][0].k.shape == (2, TINY_LLM["num_kv_heads"], batch.layout.shape[1], 4)


def test_remat_does_not_change_gradients():
    batch = tiny_batch(images=0)

    def gradients(**options):
        graphdef, state = nnx.split(tiny_model(**options))

        def total(llm):
            model = nnx.merge(graphdef, nnx.State({**state, "llm": llm}))
            return jnp.square(model(batch).hidden).sum()

        return [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(state.llm))]

    plain, remat = gradients(), gradients(remat=True)
    assert len(plain) == len(remat)
    assert max(np.abs(x).max() for x in plain) > 1
    for a, b in zip(plain, remat, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1)


def test_bfloat16_activations(reference):
    batch, expected = reference
    half = {"dtype": "bfloat16"}
    model = model_with(half, half)
    assert {x.dtype for x in parameters(model).values()} == {np.dtype("float32")}
    hidden = hidden_states(model, batch)
    assert hidden.dtype == jnp.bfloat16
    logits = model.llm.logits(hidden)
    assert logits.dtype == jnp.float32
    logits, exact = np.asarray(logits), np.asarray(tiny_model().llm.logits(expected))
    real = np.asarray(batch.layout.kind) > 0
    error = np.linalg.norm((logits - exact)[real]) / np.linalg.norm(exact[real])
    assert 1e-5 < error < 0.03  # eight bits of mantissa, a few roundings


# Initialisation


def test_a_new_model_holds_shapes_only():
    model = MLLM(tiny_config())
    assert set(abstract_params(model)) == set(parameters(tiny_model()))


@pytest.mark.parametrize("tuning", ["none", "mores:rank=2"])
def test_every_parameter_gets_a_value(tuning):
    model = tiny_model(tuning)
    assert abstract_params(model) == []
    for name, x in parameters(model).items():
        assert np.isfinite(x).all(), name


def test_a_part_starts_the_same_in_every_combination():
    whole = parameters(tiny_model())
    text_only = parameters(initialize(MLLM(MLLMConfig(llm=DecoderConfig(**TINY_LLM)))))
    other_llm = parameters(tiny_model(num_layers=2, vocab_size=31))
    classifier = parameters(initialize(PatchClassifier(VisionConfig(**TINY_VISION), (3,))))
    for other, part in ((text_only, "llm"), (other_llm, "vision"), (classifier, "vision")):
        shared = [name for name in whole if name.startswith(part)]
        assert shared
        for name in shared:
            np.testing.assert_array_equal(whole[name], other[name], err_msg=name)
    np.testing.assert_array_equal(
        whole["connector.layers.0.kernel"], other_llm["connector.layers.0.kernel"]
    )


def test_the_seed_and_the_name_decide_the_values():
    first, again, other = (parameters(tiny_model(seed=seed)) for seed in (0, 0, 1))
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name])
        constant = name.endswith(("bias", "scale"))
        assert np.array_equal(x, other[name]) == constant, name
    assert not np.array_equal(first["llm.blocks.attn.k.kernel"], first["llm.blocks.attn.v.kernel"])
    assert not np.array_equal(*first["llm.blocks.attn.k.kernel"][:2])


def test_start_values():
    start = parameters(tiny_model(hidden_size=64, vocab_size=400))
    assert start["llm.head.kernel"].std() == pytest.approx(64**-0.5, rel=0.03)
    assert start["llm.embed.table"].std() == pytest.approx(0.1, rel=0.03)
    assert (start["llm.norm.scale"] == 1).all()
    assert (start["connector.layers.0.bias"] == 0).all()


def test_initialize_keeps_what_has_a_value():
    model = MLLM(tiny_config())
    table = jnp.full((29, 16), 7.0)
    set_params(
        model, {"llm.embed.table": table, "llm.norm.scale": jnp.zeros(16)}, "here", "llm.embed"
    )
    values = parameters(initialize(model))
    np.testing.assert_array_equal(values["llm.embed.table"], table)
    assert (values["llm.norm.scale"] == 1).all()  # not below "llm.embed"


def test_fill_names_a_parameter_of_another_shape():
    with pytest.raises(UserError, match=r"here: llm\.embed\.table has shape \(3, 2\)"):
        set_params(MLLM(tiny_config()), {"llm.embed.table": jnp.zeros((3, 2))}, "here")


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'batch'"):
        Norm(4, kind="batch")


def test_param_describes():
    x = param((2, 3), ("embed", None), std=0.5)
    assert x.shape == (2, 3)
    assert x.get_metadata()["std"] == 0.5


# Connectors


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("identity", []),
        ("linear", [(5, 7)]),
        ("mlp2x_gelu", [(5, 7), (7, 7)]),
        ("mlp3x_gelu", [(5, 7), (7, 7), (7, 7)]),
    ],
)
def test_connector(name, shapes):
    connector = initialize(Connector(name, 5, 7))
    assert [layer.kernel.shape for layer in connector.layers] == shapes
    assert [layer.bias.shape for layer in connector.layers] == [(7,)] * len(shapes)
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    y = x
    for i, layer in enumerate(connector.layers):
        y = y if i == 0 else np.asarray(jax.nn.gelu(y, approximate=False))
        y = y @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    assert_close(connector(jnp.asarray(x)), y)


@pytest.mark.parametrize("name", ["mlp0x_gelu", "mlp2x_softmax", "qformer2", "", "mlp2x_gelu "])
def test_unknown_connector(name):
    with pytest.raises(UserError, match=r"unknown connector '.*'; choose from: identity, linear"):
        Connector(name, 5, 7)
    if name:  # none is named: the model's own
        with pytest.raises(UserError, match="unknown connector"):
            mllm_config("phi-2", "clip-l-14-336", name)


# Vision


def test_patches_are_in_raster_order():
    pixels = jnp.arange(4 * 6 * 3, dtype=jnp.float32).reshape(1, 4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (1, 6, 12)
    np.testing.assert_array_equal(patches[0, 1], pixels[0, :2, 2:4].ravel())
    np.testing.assert_array_equal(patches[0, 3], pixels[0, 2:, :2].ravel())


@pytest.mark.parametrize(
    ("options", "tokens", "used"),
    [
        ({}, 9, 1),
        ({"feature_layer": -1}, 9, 2),
        ({"feature_layer": 0}, 9, 0),
        ({"feature_layer": [-1, 0, 1]}, 9, 2),
        ({"feature_layer": [-2]}, 9, 1),
        ({"drop_first_token": True}, 8, 1),
        ({"class_token": True}, 9, 1),
        ({"class_token": True, "select": "cls_patch"}, 10, 1),
    ],
)
def test_features_of_an_image(options, tokens, used):
    config = VisionConfig(**(TINY_VISION | options))
    assert (config.num_tokens, config.used_layers) == (tokens, used)
    if used:
        model = initialize(VisionEncoder(config))
        features = config.num_features
        assert features == 8 * np.size(config.feature_layer)
        assert jax.eval_shape(model, jnp.zeros((2, 12, 12, 3))).shape == (2, tokens, features)


def test_layers_above_the_feature_layer_never_run():
    model = initialize(VisionEncoder(VisionConfig(**TINY_VISION)))
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 12, 3)), jnp.float32)
    before = model(pixels)
    model.tail = jax.tree.map(lambda x: x * jnp.nan, model.tail)
    model.post_norm = jax.tree.map(lambda x: x * jnp.nan, model.post_norm)
    np.testing.assert_array_equal(model(pixels), before)


# The composition


def test_ids_under_visual_tokens_are_never_read(reference):
    batch, expected = reference
    image = np.asarray(batch.layout.image) >= 0
    other = dataclasses.replace(batch, tokens=np.where(image, 3, batch.tokens).astype(np.int32))
    assert (other.tokens != batch.tokens).any()
    np.testing.assert_array_equal(hidden_states(tiny_model(), other), expected)


def test_visual_tokens_take_their_own_image():
    model, batch = tiny_model(), tiny_batch(rows=2, images=2)
    run = jax.jit(lambda model, batch: model.embed(batch, model.tuning.hooks(batch)))
    before = run(model, batch)
    changed = batch.pixels.copy()
    changed[1, 1] += 1.0
    moved = np.abs(run(model, dataclasses.replace(batch, pixels=changed)) - before).max(-1) > 1e-6
    second_image = np.asarray(batch.layout.image) >= 9
    second_image[0] = False
    np.testing.assert_array_equal(moved, second_image)


def test_a_token_does_not_see_later_ones(reference):
    batch, expected = reference
    tokens = batch.tokens.copy()
    tokens[:, 14] = (tokens[:, 14] + 1) % TINY_LLM["vocab_size"]
    hidden = hidden_states(tiny_model(), dataclasses.replace(batch, tokens=tokens))
    assert_close(hidden[:, :14], expected[:, :14])
    assert np.abs(hidden - expected)[:, 14:17].max(-1).min() > 1e-4


def test_decoding_needs_a_list_of_blocks():
    decoder = initialize(Decoder(DecoderConfig(**TINY_LLM)))
    layout = TokenLayout.text(np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="unstack"):
        decoder(jnp.zeros((1, 2, 16)), layout.position, visible(layout), caches=[])


def test_config_round_trip():
    for config in (tiny_config(), MLLMConfig(llm=LLMS["phi-2"])):
        fields = config.to_dict()
        assert DecoderConfig(**fields["llm"]) == config.llm
        assert config.vision is None or VisionConfig(**fields["vision"]) == config.vision


# Named sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi-2", 2_779_683_840),
        ("vicuna-7b", 6_738_415_616),
        ("vicuna-13b", 13_015_864_320),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_llm_sizes(name, parameters):
    report = count_parameters(mllm_config(name), "full", also_train=())
    assert report.components["llm"].total == parameters
    assert report.total == report.trainable == report.trainable_in_llm == parameters


@pytest.mark.parametrize(
    ("llm", "vision", "parameters"),
    [
        ("vicuna-7b", "clip-l-14-336", 20_979_712),
        ("phi-2", "siglip-so400m-14-384", 9_507_840),
    ],
)
def test_connector_sizes(llm, vision, parameters):
    report = count_parameters(mllm_config(llm, vision))
    assert report.components["connector"].total == parameters
    assert report.trainable == parameters
    assert report.trainable_in_llm == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    # CLIPVisionModel and SiglipVisionModel without its pooling head.
    [("clip-l-14-336", 303_507_456), ("siglip-so400m-14-384", 412_987_248)],
)
def test_vision_sizes(name, parameters):
    assert count_parameters(mllm_config("phi-2", name)).components["vision"].total == parameters


def test_visual_token_counts():
    clip, siglip = VISION["clip-l-14-336"], VISION["siglip-so400m-14-384"]
    assert clip.num_tokens == 576
    assert VISION["clip-l-14-224"].num_tokens == 256
    assert siglip.num_tokens == 729
    assert dataclasses.replace(siglip, drop_first_token=True).num_tokens == 728


@pytest.mark.parametrize("name", VISION)
def test_named_encoders_take_their_image_size(name):
    config = VISION[name]
    model = VisionEncoder(dataclasses.replace(config, num_layers=2))
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    features = nnx.eval_shape(lambda m, x: m(x), initialize_shapes(model), pixels)
    assert features.shape == (1, config.num_tokens, config.hidden_size)


def initialize_shapes(model):
    return nnx.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model))


@pytest.mark.parametrize(("what", "names"), [("LLM", ("phi-3",)), ("vision", ("phi-2", "vit"))])
def test_unknown_names(what, names):
    with pytest.raises(UserError, match=f"unknown {what}.*{names[-1]}.*choose from"):
        mllm_config(*names)


def test_changes_go_to_the_llm():
    config = mllm_config("phi-2", "clip-l-14-336", dtype="bfloat16", remat=True)
    assert (config.llm.dtype, config.llm.remat) == ("bfloat16", True)
    assert config.vision.dtype == "float32"
