"""Vision encoders: features of `transformers`, token counts, two encoders at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import path_name
from moresjax.models.count import count_parameters
from moresjax.models.decoder import DecoderConfig
from moresjax.models.fusion import FusedVisionConfig, FusedVisionEncoder
from moresjax.models.initialize import abstract_params, initialize, set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from moresjax.models.zoo import ENCODERS, VISION, mllm_config
from moresjax.runs.init_weights import split_trainable_blocks
from moresjax.testing.batches import tiny_batch
from moresjax.testing.hf_encoders import (
    ORACLES,
    TOLERANCE,
    clip,
    dinov2,
    dinov2_with_registers,
    hidden_states,
    images,
    loaded,
    randomised,
    saved,
    siglip,
)
from moresjax.testing.models import TINY_LLM, TINY_VISION
from moresjax.training.step import split_model
from moresjax.weights.vision_folder import load_vision

# Features


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request, tmp_path_factory):
    model = randomised(ORACLES[request.param]())
    return model, saved(model, tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("layer", [1, -2, -1])
def test_features(oracle, layer):
    model, folder = oracle
    pixels = images()
    theirs = hidden_states(model, pixels)[layer]
    patches = theirs[:, -9:]
    encoder = loaded(folder, feature_layer=layer)
    ours = np.asarray(encoder(jnp.asarray(pixels)))
    assert ours.shape == (2, encoder.config.num_tokens, 16) == (2, 9, 16)
    assert patches.std() > 0.2
    assert np.abs(ours - patches).max() <= TOLERANCE


def test_class_token_and_patches(oracle):
    model, folder = oracle
    encoder = loaded(folder, select="cls_patch")
    theirs = hidden_states(model, images())[-2]
    if theirs.shape[1] > 9:  # all but SigLIP
        theirs = np.concatenate([theirs[:, :1], theirs[:, -9:]], axis=1)
    ours = np.asarray(encoder(jnp.asarray(images())))
    assert ours.shape == theirs.shape == (2, encoder.config.num_tokens, 16)
    assert np.abs(ours - theirs).max() <= TOLERANCE


def test_every_parameter_counts(oracle):
    """Our parameters are the oracle's, but for its pooling head and its mask token."""
    model, folder = oracle
    _, state = load_vision(folder)
    named = dict(model.named_parameters())
    unused = [n for n in named if n.startswith("head.") or n.endswith("mask_token")]
    expected = sum(x.numel() for n, x in named.items() if n not in unused)
    assert sum(x.size for x in state.values()) == expected


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": True}])
def test_scan_options_do_not_change_the_features(tmp_path, options):
    folder = saved(randomised(dinov2_with_registers()), tmp_path)
    features = [
        jax.jit(lambda encoder, x: encoder(x))(loaded(folder, **changes), jnp.asarray(images()))
        for changes in ({}, options)
    ]
    np.testing.assert_allclose(*features, rtol=0, atol=1e-5)


def test_an_image_of_another_size(oracle):
    encoder = loaded(oracle[1])
    with pytest.raises(UserError, match=r"images have 16x16 pixels; .* takes 12x12"):
        encoder(jnp.asarray(images(size=16)))


def test_unknown_selection():
    with pytest.raises(UserError, match=r"select .*'cls'; choose from: patch, cls_patch"):
        VisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            image_size=8,
            patch_size=4,
            select="cls",
        )


# Two encoders


def pair(fusion="interleave", **second) -> FusedVisionConfig:
    encoders = (
        VisionConfig(**TINY_VISION, class_token=True, pixel_mean=(0.4, 0.5, 0.6)),
        VisionConfig(
            **(TINY_VISION | {"num_layers": 3, "class_token": True, "registers": 2} | second),
            pixel_mean=IMAGENET_MEAN,
            pixel_std=IMAGENET_STD,
        ),
    )
    return FusedVisionConfig(encoders=encoders, fusion=fusion)


@pytest.mark.parametrize(
    ("config", "shape"),
    [(pair(), (2, 18, 8)), (pair("channels", hidden_size=12), (2, 9, 20))],
)
def test_two_encoders(config, shape):
    """Each sees the raw image in its own normalisation; the result is put together by hand."""
    both = initialize(FusedVisionEncoder(config))
    assert shape[1:] == (config.num_tokens, config.num_features)
    raw = np.random.default_rng(0).uniform(size=(2, 12, 12, 3)).astype(np.float32)

    def normalised(c):
        return jnp.asarray((raw - np.float32(c.pixel_mean)) / np.float32(c.pixel_std))

    ours = np.asarray(both(normalised(config)))
    assert ours.shape == shape
    first, second = (np.asarray(e(normalised(e.config))) for e in both.encoders)
    if config.fusion == "interleave":
        np.testing.assert_allclose(ours[:, 0::2], first, atol=1e-5)
        np.testing.assert_allclose(ours[:, 1::2], second, atol=1e-5)
    else:
        np.testing.assert_allclose(ours[..., :8], first, atol=1e-5)
        np.testing.assert_allclose(ours[..., 8:], second, atol=1e-5)
    assert np.abs(first).std() > 0.1


def test_encoders_that_do_not_fit_together():
    with pytest.raises(UserError, match="differ in hidden_size: 8 and 12"):
        pair(hidden_size=12)
    with pytest.raises(UserError, match="differ in image_size: 12 and 16"):
        pair("channels", image_size=16)
    with pytest.raises(UserError, match="differ in num_patches: 9 and 16"):
        pair("channels", patch_size=3)
    with pytest.raises(UserError, match="differ in num_tokens: 9 and 10"):
        pair(select="cls_patch")
    with pytest.raises(UserError, match="'sum'; choose from: interleave, channels"):
        pair("sum")
    with pytest.raises(UserError, match="are two, got 1"):
        FusedVisionConfig(encoders=pair().encoders[:1])


def test_a_pair_has_no_vision_sites():
    config = MLLMConfig(llm=DecoderConfig(**TINY_LLM), vision=pair())
    MLLM(config, "mores:rank=1")
    with pytest.raises(UserError, match="needs one vision encoder"):
        MLLM(config, "mores:rank=1,site=vision.block.out")
    with pytest.raises(UserError, match="target of lora"):
        MLLM(config, "lora:rank=1,targets=vision.q")


# Tuning


def test_edits_of_patches_leave_class_and_register_tokens(tmp_path):
    """`image` selects the nine patches among 1 + 5 + 9 encoder tokens."""
    folder = saved(randomised(dinov2_with_registers()), tmp_path)
    config, state = load_vision(folder, part="vision", feature_layer=-1, select="cls_patch")
    model = MLLM(
        MLLMConfig(llm=DecoderConfig(**TINY_LLM), vision=config),
        "mores:rank=2,positions=image,site=vision.block.out",
    )
    set_params(model, state, "here")
    initialize(model)
    batch = tiny_batch()
    hooks = model.tuning.hooks(batch)
    mask = np.asarray(hooks.tower("vision")._items[0][1].mask)
    assert mask.shape == (2, 15)
    assert not mask[:, :6].any()
    assert mask[:, 6:].all()
    pixels = jnp.asarray(batch.pixels[:, 0])
    plain = np.asarray(model.vision(pixels))
    tuned = np.asarray(model.vision(pixels, hooks.tower("vision")))
    assert np.abs(tuned - plain)[:, 1:].max(-1).min() > 1e-3


# Named sizes


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("clip-l-14-336", 576),
        ("siglip-so400m-14-384", 729),
        ("siglip-b-16-224", 196),
        ("siglip-b-16-256", 256),
        ("siglip-b-16-384", 576),
        ("siglip-l-16-384", 576),
        ("siglip-so400m-14-224", 256),
        ("dinov2-l-14", 1369),
        ("dinov2-reg4-b-14", 1369),
        ("mof-l-14-336", 1152),
        ("dinov2-siglip-so400m-14-384", 729),
    ],
)
def test_visual_tokens(name, tokens):
    config = mllm_config("phi-2", name)
    assert config.visual_tokens == config.vision.num_tokens == tokens
    if name == "siglip-so400m-14-384":
        assert dataclasses.replace(ENCODERS[name], drop_first_token=True).num_tokens == 728
    if name == "dinov2-siglip-so400m-14-384":
        assert config.vision.num_features == 1024 + 1152


@pytest.mark.parametrize("name", [n for n in VISION if n.startswith(("siglip", "dinov2"))])
def test_encoder_sizes(name):
    """The model of `transformers` with the published configuration has as many parameters."""
    kind, size, *_ = name.replace("dinov2-reg4", "dinov2_reg4").split("-")
    width, layers, heads, mlp = {
        "s": (384, 12, 6, 1536),
        "b": (768, 12, 12, 3072),
        "l": (1024, 24, 16, 4096),
        "g": (1536, 40, 24, 6144),
        "so400m": (1152, 27, 16, 4304),
    }[size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    with torch.device("meta"):
        if kind == "siglip":
            patch, image = map(int, name.split("-")[2:4])
            options = {"intermediate_size": mlp, "patch_size": patch, "image_size": image}
            model = siglip(**sizes, **options, vision_use_head=False)
        else:
            options = {"patch_size": 14, "image_size": 518, "mlp_ratio": 4}
            options["use_swiglu_ffn"] = size == "g"
            registers = {"num_register_tokens": 4} if kind == "dinov2_reg4" else {}
            model = (dinov2_with_registers if registers else dinov2)(
                **sizes, **options, **registers
            )
    expected = sum(x.numel() for n, x in model.named_parameters() if not n.endswith("mask_token"))
    assert count_parameters(mllm_config("phi-2", name)).components["vision"].total == expected


def test_blocks_that_are_kept_apart_compute_the_same_and_train_alone(tmp_path):
    folder = saved(randomised(clip()), tmp_path)
    whole, apart = loaded(folder), loaded(folder, num_trainable_blocks=1)
    assert apart.last.mlp.up.kernel[...].shape[0] == apart.blocks.mlp.up.kernel[...].shape[0] == 1
    expected = np.asarray(whole(jnp.asarray(images())))
    np.testing.assert_allclose(np.asarray(apart(jnp.asarray(images()))), expected, atol=1e-6)
    model = MLLM(MLLMConfig(llm=DecoderConfig(**TINY_LLM), vision=apart.config))
    _, trainable, _ = split_model(initialize(model), ("vision:last1",))
    names = {path_name(path) for path, _ in nnx.to_flat_state(trainable)}
    assert all(name.startswith("vision.last.") for name in names)
    assert len(names) == 16
    with pytest.raises(UserError, match="last 2 of 2 vision blocks cannot be kept apart"):
        dataclasses.replace(apart.config, num_trainable_blocks=2)


def test_a_run_with_all_blocks_in_one_stack_fills_a_model_that_keeps_some_apart(tmp_path):
    folder = saved(randomised(clip()), tmp_path / "clip")
    config, parameters = load_vision(folder, part="vision")
    apart = dataclasses.replace(config, num_trainable_blocks=1)
    model = MLLM(MLLMConfig(llm=DecoderConfig(**TINY_LLM), vision=apart))
    set_params(model, split_trainable_blocks(model, "vision", parameters), "here")
    assert abstract_params(model, "vision") == []
    np.testing.assert_allclose(
        model.vision(jnp.asarray(images())), loaded(folder)(jnp.asarray(images())), atol=1e-6
    )
