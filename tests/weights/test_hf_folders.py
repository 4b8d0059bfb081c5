"""Hugging Face folders as they are saved and published, and what is said of damaged ones."""

import json

import pytest
from hf_models import (
    LEFT,
    LLAVAS,
    LLMS,
    assert_same_logits,
    built,
    clip,
    image_rows,
    llama,
    llava,
    padded,
    pixels,
    text_rows,
)
from safetensors.numpy import load_file, save_file
from transformers import (
    LlavaConfig,
)

from moresjax.core.errors import UserError
from moresjax.inference.load import load
from moresjax.weights.families.base import vision_config
from moresjax.weights.hf import (
    config_from_hf,
    load_pretrained,
)


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
