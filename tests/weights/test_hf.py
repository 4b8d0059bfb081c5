"""Hugging Face checkpoints: the same weights give the logits of `transformers`, in fp32."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights

from moresjax.core.errors import UserError
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import decoder_config, vision_config
from moresjax.weights.hf import (
    build_mllm,
    config_from_hf,
    import_params,
    load_pretrained,
    model_mappings,
)

TOLERANCE = 1e-4
VOCAB, IMAGE_ID = 61, 60
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
LEFT, RIGHT = True, False


# The oracles


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**(TEXT | {"num_key_value_heads": 2, "rope_theta": 500.0} | changes))


def phi(**changes) -> PhiConfig:
    return PhiConfig(**(TEXT | {"partial_rotary_factor": 0.5, "pad_token_id": 0} | changes))


def clip(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**(TOWER | changes))


def siglip(**changes) -> SiglipVisionConfig:
    return SiglipVisionConfig(**(TOWER | changes))


def randomised(model, std: float = 0.15, seed: int = 0):
    """Random matrices; norm scales around one and biases far from zero, so that each one shows."""
    generator, width = torch.Generator().manual_seed(seed), 3**0.5 * std
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-width, width, generator=generator)
            else:
                mean = float("norm" in name and name.endswith("weight"))
                parameter.normal_(mean, 0.3, generator=generator)
    return model.eval()


def built(kind, config, **options):
    with no_init_weights():
        model = kind(config)
    model.tie_weights()
    return randomised(model, **options)


def llava(text, vision, **changes) -> LlavaForConditionalGeneration:
    options = {"image_token_index": IMAGE_ID} | changes
    config = LlavaConfig(text_config=text, vision_config=vision, **options)
    return built(LlavaForConditionalGeneration, config)


def imported(oracle) -> Model:
    """Our model with the oracle's weights, without a file between them."""
    hf = oracle.config.to_dict()
    is_llava = hf["model_type"] == "llava"
    config = config_from_hf(hf) if is_llava else MLLMConfig(llm=decoder_config(hf))
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    return Model(build_mllm(config, import_params(config, hf, tensors)), None)


# Inputs


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask of unequal rows."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


def text_rows(*lengths: int, vocab: int = VOCAB - 1) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, vocab, n).tolist() for n in lengths]


def image_rows(images: tuple[int, ...], visual: int) -> list[list[int]]:
    """Rows with that many images each and text before, between and after them."""
    rows = []
    for number, count in enumerate(images):
        first, *others = text_rows(2 + number, *[3] * count)
        rows.append(first + [i for text in others for i in [IMAGE_ID] * visual + text])
    return rows


def pixels(count: int, size: int) -> np.ndarray | None:
    rng = np.random.default_rng(8)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32) if count else None


def assert_same_logits(oracle, ours: Model, ids, mask, images=None):
    extra = {} if images is None else {"pixel_values": torch.tensor(images)}
    with torch.no_grad():
        theirs = oracle(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **extra
        ).logits.numpy()
    logits = np.asarray(
        ours.logits(
            input_ids=ids, attention_mask=mask, pixel_values=images, image_token_id=IMAGE_ID
        )
    )
    assert logits.dtype == np.float32
    assert logits.shape == theirs.shape
    real = mask.astype(bool)
    assert theirs[real].std() > 0.2, "the oracle's logits say nothing"
    assert np.abs(logits - theirs)[real].max() <= TOLERANCE


# Language models

LLMS = {
    "llama": (LlamaForCausalLM, llama()),
    "llama, tied": (LlamaForCausalLM, llama(tie_word_embeddings=True)),
    "llama, biases and wide heads": (
        LlamaForCausalLM,
        llama(attention_bias=True, mlp_bias=True, head_dim=12),
    ),
    "phi": (PhiForCausalLM, phi(hidden_size=80, partial_rotary_factor=0.4, rope_theta=300.0)),
}


@pytest.fixture(scope="module", params=LLMS)
def llm(request):
    oracle = built(*LLMS[request.param])
    return oracle, imported(oracle)


@pytest.mark.parametrize("left", [LEFT, RIGHT])
def test_llm_logits(llm, left):
    assert_same_logits(*llm, *padded(text_rows(9, 5, 1), left))


def test_config_of_transformers_4():
    hf = phi(rope_theta=300.0, partial_rotary_factor=0.4).to_dict()
    del hf["rope_parameters"]
    config = decoder_config(hf | {"rope_theta": 300.0, "partial_rotary_factor": 0.4})
    assert (config.rope_theta, config.rotary_fraction) == (300.0, 0.4)


def test_tied_embeddings_have_no_head():
    ours = imported(built(*LLMS["llama, tied"]))
    assert ours.mllm.llm.head is None
    assert ours.config.llm.tie_embeddings


# LLaVA

LLAVAS = {
    "llama + clip": (llama(), clip()),
    "phi + siglip": (phi(), siglip()),
}


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


# Cuts of the published sizes: full width, two layers, a short vocabulary

WIDE = {
    "phi-2": (
        PhiForCausalLM,
        phi(
            vocab_size=128,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=2,
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
            num_hidden_layers=2,
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


# Folders


@pytest.fixture(scope="module")
def llava_oracle():
    return llava(*LLAVAS["llama + clip"])


def assert_folder_loads(folder, oracle):
    ours = load(folder)
    assert ours.processor is None
    if oracle.config.model_type == "llava":
        ids, mask = padded(image_rows((1, 0), ours.config.visual_tokens), LEFT)
        assert_same_logits(oracle, ours, ids, mask, pixels(1, 12))
    else:
        assert_same_logits(oracle, ours, *padded(text_rows(6, 4), LEFT))


@pytest.mark.parametrize("name", ["llama, tied", "phi"])
def test_saved_llm_folder(name, tmp_path):
    oracle = built(*LLMS[name])
    oracle.save_pretrained(tmp_path)
    assert_folder_loads(tmp_path, oracle)


def test_sharded_folder(tmp_path):
    oracle = built(*LLMS["llama"])
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_folder_loads(tmp_path, oracle)


def test_saved_llava_folder(llava_oracle, tmp_path):
    # `save_pretrained` writes the names of the published checkpoints, not those of the modules.
    llava_oracle.save_pretrained(tmp_path)
    assert_folder_loads(tmp_path, llava_oracle)


def test_published_llava_folder(llava_oracle, tmp_path):
    # llava-hf/llava-1.5-7b-hf on the hub has one more level in the names of the vision tower.
    llava_oracle.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {
        n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert_folder_loads(tmp_path, llava_oracle)


# Errors


@pytest.fixture
def folder(tmp_path):
    built(*LLMS["phi"]).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=rf"{folder}.*config\.json"):
        load(folder)
    with pytest.raises(UserError, match=rf"{folder}.*config\.json"):
        load_pretrained(folder)


def test_no_safetensors(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{folder}.*safetensors"):
        load(folder)


def test_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.fc2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.fc2\.bias"):
        load(folder)


def test_tensor_of_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \(60, 80\).*\(61, 80\)"):
        load(folder)


def test_unsupported_llm(folder):
    edit_config(folder, model_type="gpt2")
    with pytest.raises(UserError, match=r"LLM family 'gpt2'.*llama, mistral, opt, phi"):
        load(folder)


def test_unsupported_vision_encoder():
    hf = LlavaConfig(text_config=llama(), vision_config=clip()).to_dict()
    hf["vision_config"]["model_type"] = "vit"
    with pytest.raises(UserError, match=r"vision encoder family 'vit'.*clip_vision_model"):
        config_from_hf(hf)
    with pytest.raises(UserError, match="'vit'"):
        vision_config(hf["vision_config"])


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
    ],
)
def test_rope_scaling(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=r"rope scaling .*linear.* not supported"):
        load(folder)
