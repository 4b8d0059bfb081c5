"""Parts of a model from folders of their own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
)

from moresjax.core.errors import UserError
from moresjax.inference.load import load
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import abstract_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.runs.architecture import model_config
from moresjax.runs.config import base_config
from moresjax.runs.init_weights import load_part, load_parts
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import resolve
from moresjax.testing.hf_encoders import (
    MLP,
    SIZES,
    TOLERANCE,
    clip,
    dinov2,
    dinov2_with_registers,
    hidden_states,
    images,
    loaded,
    randomised,
    saved,
)
from moresjax.testing.models import TINY_LLM
from moresjax.weights.vision_folder import load_vision

# Folders: the encoder alone or beside a text encoder, names with and without a prefix

TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def llama(**changes) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**(TEXT | changes))))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_two_towers(tmp_path, kind):
    model, config = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}[kind]
    text = TEXT | {"max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    whole = randomised(model(config(text_config=text, vision_config=SIZES | MLP)))
    theirs = hidden_states(whole.vision_model, images())[-2][:, -9:]
    ours = loaded(saved(whole, tmp_path))(jnp.asarray(images()))
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE


def test_a_folder_with_a_classifier_on_top(tmp_path):
    whole = randomised(Dinov2ForImageClassification(dinov2().config))
    theirs = hidden_states(whole.dinov2, images())[-2][:, -9:]
    ours = loaded(saved(whole, tmp_path))(jnp.asarray(images()))
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE


def test_a_llava_folder_with_dinov2(tmp_path):
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=dinov2().config, image_token_index=29
    )
    oracle = randomised(LlavaForConditionalGeneration(config))
    ours = load(saved(oracle, tmp_path))
    assert ours.config.visual_tokens == 9
    ids = np.asarray([[1, 2] + [29] * 9 + [3, 4, 5]])
    pixels = images(1).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits
    logits = ours.logits(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        pixel_values=pixels,
        image_token_id=29,
    )
    assert theirs.std() > 0.2
    assert np.abs(np.asarray(logits) - theirs.numpy()).max() <= TOLERANCE
    # The same folder is a source of each of its parts.
    model = MLLM(ours.config)
    for part in ("llm", "vision", "connector"):
        load_part(model, part, tmp_path)
        assert not abstract_params(model, part)


def test_a_llava_folder_with_registers(tmp_path):
    """transformers hands the registers to the LLM; we never do."""
    vision = dinov2_with_registers().config
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="register tokens is not supported"):
        load(tmp_path)


def test_parts_from_folders_of_their_own(tmp_path):
    tower = randomised(dinov2_with_registers())
    text = llama()
    saved(tower, tmp_path / "vision")
    saved(text, tmp_path / "llm")
    config, _ = load_vision(tmp_path / "vision")
    llm = load(tmp_path / "llm").config.llm
    model = MLLM(MLLMConfig(llm=llm, vision=dataclasses.replace(config, feature_layer=1)))
    load_parts(model, {"llm": "./llm", "vision": "./vision", "connector": "random"}, tmp_path)
    assert {name.split(".")[0] for name in abstract_params(model)} == {"connector"}
    features = model.vision(jnp.asarray(images()))
    assert np.abs(features - hidden_states(tower, images())[1][:, -9:]).max() <= TOLERANCE
    head = text.lm_head.weight.detach().numpy().T
    np.testing.assert_array_equal(model.llm.head.kernel[...], head)
    with pytest.raises(UserError, match="LLM family 'dinov2_with_registers'"):
        load_part(model, "llm", tmp_path / "vision")
    with pytest.raises(UserError, match="holds no weights for vision"):
        load_part(MLLM(model.config), "vision", tmp_path / "llm")
    with pytest.raises(UserError, match="neither a workdir nor a Hugging Face folder"):
        load_part(MLLM(model.config), "vision", tmp_path)


@pytest.mark.parametrize(
    "changes", [{"norm_eps": 1e-5}, {"activation": "gelu_tanh"}, {"num_heads": 4, "head_dim": 4}]
)
def test_weights_of_another_architecture(tmp_path, changes):
    """Differences that no shape shows."""
    config, _ = load_vision(saved(dinov2(), tmp_path))
    vision = dataclasses.replace(config, **changes)
    model = MLLM(MLLMConfig(llm=DecoderConfig(**TINY_LLM), vision=vision))
    with pytest.raises(UserError, match=f"has {next(iter(changes))}=.*the model's vision encoder"):
        load_part(model, "vision", tmp_path)


def test_unsupported_folders(tmp_path):
    sizes = {k: v for k, v in SIZES.items() if k != "image_size"}
    saved(Siglip2VisionModel(Siglip2VisionConfig(**sizes, **MLP, num_patches=9)), tmp_path / "any")
    with pytest.raises(UserError, match="vision encoder family 'siglip2_vision_model'"):
        load_vision(tmp_path / "any")
    folder = saved(dinov2(), tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"
    ):
        load_vision(folder)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_vision(tmp_path)


def test_a_pair_from_a_run_configuration_and_two_folders(tmp_path):
    for name, model in {"a": clip(), "b": dinov2()}.items():
        saved(randomised(model), tmp_path / name)
    encoders = [dataclasses.asdict(load_vision(tmp_path / name)[0]) for name in "ab"]
    run = base_config()
    run.model.llm, run.model.connector = dict(TINY_LLM), "mof_mlp"
    run.model.vision = {"encoders": encoders, "fusion": "interleave"}
    run.tokenizer = "digits"
    run = resolve(run)
    config = model_config(run)
    fields = config.to_dict()["vision"]["encoders"]
    assert [VisionConfig(**encoder) for encoder in fields] == [*config.vision.encoders]
    processor = build_processor(run)
    assert processor.visual_tokens == config.visual_tokens == 18
    assert processor.image.mean == config.vision.encoders[0].pixel_mean != (0.5, 0.5, 0.5)
    model = MLLM(config)
    load_parts(model, {"llm": "random", "vision": "./a;./b", "connector": "random"}, tmp_path)
    assert not abstract_params(model, "vision")
    for encoder, name in zip(model.vision.encoders, "ab", strict=True):
        expected = loaded(tmp_path / name)(jnp.asarray(images()))
        np.testing.assert_allclose(encoder(jnp.asarray(images())), expected, atol=1e-6)
    for sources, message in (("./a", "name two"), ("./a;./b;a", "3 folders; the model needs 2")):
        with pytest.raises(UserError, match=message):
            load_parts(MLLM(config), {"llm": "random", "vision": sources}, tmp_path)
