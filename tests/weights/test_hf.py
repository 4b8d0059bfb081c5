"""Hugging Face checkpoints: the same weights give the logits of `transformers`, in fp32."""

import numpy as np
import pytest
from hf_models import (
    IMAGE_ID,
    LEFT,
    LLAVAS,
    LLMS,
    RIGHT,
    assert_same_logits,
    built,
    clip,
    image_rows,
    imported,
    llama,
    llava,
    padded,
    phi,
    pixels,
    randomised,
    siglip,
    text_rows,
)
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiForCausalLM,
    SiglipVisionConfig,
)

from moresjax.core.errors import UserError
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import (
    model_mappings,
)


@pytest.fixture(scope="module", params=LLMS)
def llm(request):
    oracle = built(*LLMS[request.param])
    return oracle, imported(oracle)


@pytest.mark.parametrize("left", [LEFT, RIGHT])
def test_llm_logits(llm, left):
    assert_same_logits(*llm, *padded(text_rows(9, 5, 1), left))


def test_config_of_transformers_4():
    hf = phi(rope_theta=300.0, partial_rotary_factor=0.25).to_dict()
    del hf["rope_parameters"]
    config = decoder_config(hf | {"rope_theta": 300.0, "partial_rotary_factor": 0.25})
    assert (config.rope_theta, config.rotary_fraction) == (300.0, 0.25)


def test_tied_embeddings_have_no_head():
    ours = imported(built(*LLMS["llama, tied"]))
    assert ours.mllm.llm.head is None
    assert ours.config.llm.tie_embeddings


# LLaVA


@pytest.fixture(scope="module", params=LLAVAS)
def multimodal(request):
    oracle = llava(*LLAVAS[request.param])
    return oracle, imported(oracle)


@pytest.mark.parametrize("left", [LEFT, RIGHT])
@pytest.mark.parametrize("images", [(0, 0), (2, 0, 1)])
def test_llava_logits(multimodal, images, left):
    oracle, ours = multimodal
    ids, mask = padded(image_rows(images, ours.config.visual_tokens), left)
    assert_same_logits(oracle, ours, ids, mask, pixels(sum(images), 12))


@pytest.mark.parametrize(
    ("tower", "strategy", "layer", "visual"),
    [
        (clip(), "default", -1, 9),
        (clip(), "full", -2, 10),
        (clip(), "full", 1, 10),
        (siglip(), "full", -2, 9),
        # "default" drops the first token, although it is no class token.
        (siglip(), "default", -3, 8),
        # The features of several layers stand side by side, in the given order.
        (clip(), "default", [-1, 0, -2], 9),
        (siglip(), "full", [1, 1], 9),
    ],
)
def test_llava_features(tower, strategy, layer, visual):
    oracle = llava(
        llama(num_hidden_layers=1),
        tower,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    ours = imported(oracle)
    assert ours.config.visual_tokens == visual
    ids, mask = padded(image_rows((1,), visual), LEFT)
    assert_same_logits(oracle, ours, ids, mask, pixels(1, 12))


def test_image_size_that_patches_do_not_divide():
    # SigLIP-so400m: 384 pixels in patches of 14; the convolution leaves the last ones out.
    oracle = llava(llama(num_hidden_layers=1), siglip(image_size=14))
    ours = imported(oracle)
    ids, mask = padded(image_rows((1,), ours.config.visual_tokens), LEFT)
    assert_same_logits(oracle, ours, ids, mask, pixels(1, 14))


def test_image_tokens_and_images_must_agree():
    ours = imported(llava(*LLAVAS["llama + clip"]))
    ids, mask = padded(image_rows((1,), 9), LEFT)
    with pytest.raises(UserError, match="9 image tokens do not match 2 images"):
        ours.logits(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels(2, 12),
            image_token_id=IMAGE_ID,
        )
    with pytest.raises(UserError, match="8 image tokens"):
        ours.logits(
            input_ids=np.where(np.cumsum(ids == IMAGE_ID) > 8, 1, ids),
            attention_mask=mask,
            pixel_values=pixels(1, 12),
            image_token_id=IMAGE_ID,
        )


# Cuts of the published sizes: full width, one layer, a short vocabulary

WIDE = {
    "phi-2": (
        PhiForCausalLM,
        phi(
            vocab_size=128,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=1,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
        ),
    ),
    "vicuna-13b": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128,
            hidden_size=5120,
            intermediate_size=13_824,
            num_hidden_layers=1,
            num_attention_heads=40,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_full_width_llm_logits(name):
    oracle = built(*WIDE[name], std=0.02)
    assert_same_logits(oracle, imported(oracle), *padded(text_rows(10, 7, vocab=128), LEFT))


WIDE_TOWERS = {
    "clip-l-14": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        patch_size=14,
        image_size=42,
    ),
    "siglip-so400m-14": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=2,
        num_attention_heads=16,
        patch_size=14,
        image_size=42,
    ),
}


@pytest.mark.parametrize("name", WIDE_TOWERS)
def test_full_width_vision_logits(name):
    config = LlavaConfig(
        text_config=llama(num_hidden_layers=1),
        vision_config=WIDE_TOWERS[name],
        image_token_index=IMAGE_ID,
    )
    oracle = built(LlavaForConditionalGeneration, config, std=0.04)
    randomised(oracle.model.language_model)
    randomised(oracle.lm_head)
    ours = imported(oracle)
    ids, mask = padded(image_rows((1, 0), ours.config.visual_tokens), RIGHT)
    assert_same_logits(oracle, ours, ids, mask, pixels(1, 42))


# Every tensor has a place

# The wrapper has no pooling head, and neither do we.
UNUSED = ("model.vision_tower.head.",)


@pytest.mark.parametrize("name", [*LLMS, *LLAVAS])
def test_every_tensor_is_imported(name):
    oracle = built(*LLMS[name]) if name in LLMS else llava(*LLAVAS[name])
    config = imported(oracle).config
    sources = model_mappings(config, oracle.config.to_dict())
    used = [tensor for source in sources for tensor in source.names]
    assert len(used) == len(set(used)), "one tensor fills two parameters"
    tensors = set(oracle.state_dict())
    if config.llm.tie_embeddings:
        tensors.discard("lm_head.weight")
    assert {t for t in tensors - set(used) if not t.startswith(UNUSED)} == set()
    assert set(used) <= tensors
