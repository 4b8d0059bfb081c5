"""Folders of Hugging Face: which files are read, and what `config.json` says about them."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
)

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.testing.hf_llavas import IMAGE_ID, PAD, TEXT, TOWER
from moresjax.testing.hf_llms import LLAMA3, randomised
from moresjax.weights.export import export_hf
from moresjax.weights.files import open_tensors
from moresjax.weights.hf import load_pretrained

IDS = np.asarray([[7, 9, 11, 30, 2]])
LLAMA = LlamaConfig(**TEXT, num_key_value_heads=2, rope_parameters=LLAMA3)


def llava(text=LLAMA, **changes) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IMAGE_ID,
        **changes,
    )
    return randomised(LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(folder)
    return folder


def copied(source, folder, **changes):
    """The folder's files with some keys of `config.json` changed."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change_json(folder / "config.json", **changes)
    return folder


def change_json(file, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def theirs(oracle, ids=IDS, pixels=None) -> np.ndarray:
    images = {} if pixels is None else {"pixel_values": torch.tensor(pixels)}
    with torch.no_grad():
        return oracle.eval()(input_ids=torch.tensor(ids), **images).logits.numpy()


def ours(folder, ids=IDS, pixels=None) -> np.ndarray:
    images = {} if pixels is None else {"pixel_values": pixels, "image_token_id": IMAGE_ID}
    return np.asarray(mj.load(folder).logits(input_ids=ids, **images))


def check_equal(folder, oracle, ids=IDS, pixels=None) -> None:
    expected = theirs(oracle, ids, pixels)
    assert np.abs(ours(folder, ids, pixels) - expected).max() <= 1e-4


# Which files are read


def test_other_files_beside_the_standard_one_are_not_read(source, tmp_path):
    folder = copied(source, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, folder / "old.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(3, 4)}, folder / "consolidated.safetensors")
    save_file({"base_model.x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    np.testing.assert_array_equal(ours(folder), ours(source))


def test_an_index_says_which_files_are_read(source, tmp_path):
    oracle = LlavaForConditionalGeneration.from_pretrained(source)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    tensors = load_file(source / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, tmp_path / "model-9.safetensors")
    np.testing.assert_array_equal(ours(tmp_path), ours(source))
    name, shard = next(iter(shards.items()))
    change_json(index, weight_map=shards | {name: "../elsewhere.safetensors"})
    with pytest.raises(UserError, match=r"index\.json names \.\./elsewhere\.safetensors, which"):
        open_tensors(tmp_path)
    change_json(index, weight_map=shards | {"lm_head.bias": shard})
    with pytest.raises(UserError, match=rf"says that lm_head\.bias is in {shard}, but it is not"):
        open_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json cannot be used"):
        open_tensors(tmp_path)


def test_a_folder_without_a_standard_name_is_told_so(tmp_path):
    save_file({"tok_embeddings.weight": torch.ones(3, 4)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors and no .*; consolidated"):
        open_tensors(tmp_path)


# What config.json says


@pytest.mark.parametrize("name", ["relu", "silu", "quick_gelu", "gelu_pytorch_tanh"])
def test_the_activation_of_the_projector(name, source, tmp_path):
    (tmp_path / name).mkdir()
    folder = copied(source, tmp_path / name, projector_hidden_act=name)
    oracle = LlavaForConditionalGeneration.from_pretrained(folder)
    ids = np.asarray([[IMAGE_ID] * 4 + [7, 9, 11]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    check_equal(folder, oracle, ids, pixels)
    again = export_hf(load_pretrained(folder), tmp_path / "out")
    check_equal(again, oracle, ids, pixels)


def phi(**changes) -> PhiConfig:
    return PhiConfig(**TEXT, partial_rotary_factor=0.5, pad_token_id=PAD, **changes)


def test_tied_phi_keeps_the_bias_of_its_head(tmp_path):
    oracle = randomised(AutoModelForCausalLM.from_config(phi(tie_word_embeddings=True)))
    oracle.save_pretrained(tmp_path / "phi")
    assert "lm_head.weight" not in load_file(tmp_path / "phi" / "model.safetensors")
    check_equal(tmp_path / "phi", oracle)
    check_equal(export_hf(load_pretrained(tmp_path / "phi"), tmp_path / "out"), oracle)
    llava(phi(tie_word_embeddings=True)).save_pretrained(tmp_path / "llava")
    folder = tmp_path / "llava"
    check_equal(folder, LlavaForConditionalGeneration.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_an_own_head_is_kept_whatever_the_file_says_of_tying(kind, source, tmp_path):
    if kind == "llava":
        folder, auto = copied(source, tmp_path, tie_word_embeddings=True), None
        oracle = LlavaForConditionalGeneration.from_pretrained(folder)
    else:
        folder, auto = tmp_path, AutoModelForCausalLM
        randomised(auto.from_config(LLAMA)).save_pretrained(folder)
        change_json(folder / "config.json", tie_word_embeddings=True)
        oracle = auto.from_pretrained(folder)
    assert not torch.equal(oracle.lm_head.weight, oracle.get_input_embeddings().weight)
    check_equal(folder, oracle)


@pytest.mark.parametrize("stored", ["both", "head"])
def test_one_table_under_either_name_is_tied(stored, tmp_path):
    oracle = randomised(AutoModelForCausalLM.from_config(LLAMA))
    oracle.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_pretrained(tmp_path).config.llm.tie_embeddings
    check_equal(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized_folders_are_refused_in_one_sentence(part, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = copied(source, tmp_path, **({part: config[part] | how} if part else how))
    with pytest.raises(UserError, match=r"is quantized \(fp8\), which is not supported"):
        mj.load(folder)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (GemmaConfig, {"hidden_act": "gelu"}),
        (Gemma2Config, {"hidden_activation": "gelu", "hidden_act": "relu"}),
    ],
)
def test_gemma_reads_the_activation_that_transformers_reads(family, changes, tmp_path):
    config = family(**TEXT, num_key_value_heads=2, head_dim=8, **changes)
    oracle = randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    oracle.save_pretrained(tmp_path)
    check_equal(tmp_path, oracle)
