"""The `config.json` of published models is read: their keys are all listed, and mean what they did.

The dictionaries were written down from memory of the files on the hub, not copied from them, and
leave out sizes that no test needs: a key that is missing here may still be in a published file.
"""

import json
from typing import Any

import pytest

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.saved_processors import check_image_processor, check_tokenizer
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.generation_config import read_generation_config
from moresjax.weights.hf import HFFolder
from moresjax.weights.vision_folder import load_vision_config

RELEASE_4 = {"torch_dtype": "float16", "transformers_version": "4.37.2", "use_cache": True}
CLIP_TOWER = {
    **{"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "patch_size": 14},
    **{"model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24},
    **{"projection_dim": 768, "vocab_size": 32000},
}
# What release 4.21 wrote about every part.
LEGACY: dict[str, Any] = {
    **{"_name_or_path": "", "add_cross_attention": False, "architectures": None},
    **{"attention_dropout": 0.0, "bad_words_ids": None, "bos_token_id": None, "dropout": 0.0},
    **{"chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "do_sample": False},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "early_stopping": False},
    **{"encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "finetuning_task": None},
    **{"exponential_decay_length_penalty": None, "forced_bos_token_id": None},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0},
    **{"is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"max_length": 20, "min_length": 0, "num_beams": 1, "output_attentions": False},
    **{"output_hidden_states": False, "pad_token_id": None, "prefix": None, "pruned_heads": {}},
    **{"problem_type": None, "remove_invalid_values": False, "repetition_penalty": 1.0},
    **{"return_dict": True, "sep_token_id": None, "task_specific_params": None},
    **{"temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False},
    **{"tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0},
    **{"torch_dtype": None, "torchscript": False, "transformers_version": "4.21.3"},
    **{"typical_p": 1.0, "use_bfloat16": False},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-1.5-7b-hf": {
        **{"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100},
        **{"image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001},
        **{"projector_hidden_act": "gelu", "tie_word_embeddings": False, "image_seq_length": 576},
        "text_config": {
            **{"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"]},
            **{"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05},
            **{"torch_dtype": "float16", "vocab_size": 32064},
        },
        "vision_config": CLIP_TOWER,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        **{"torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vocab_size": 32064},
    },
    "vicuna-7b": {
        **{"_name_or_path": "vicuna-7b", "model_type": "llama", "hidden_act": "silu"},
        **{"max_sequence_length": 2048, "pretraining_tp": 1, "rope_scaling": None, **RELEASE_4},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.02},
    },
    "llama-3.2-1b": {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000},
        **{"eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu"},
        **{"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama"},
        **{"pretraining_tp": 1, "rope_theta": 500000.0, "tie_word_embeddings": True},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        **RELEASE_4,
    },
    "phi-2": {
        **{"model_type": "phi", "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1},
        **{"hidden_act": "gelu_new", "layer_norm_eps": 1e-05, "partial_rotary_factor": 0.4},
        **{"num_key_value_heads": 32, "qk_layernorm": False, "rope_scaling": None},
        **{"rope_theta": 10000.0, "hidden_size": 2560, "vocab_size": 51200, **RELEASE_4},
    },
    "qwen2.5-0.5b": {
        **{"model_type": "qwen2", "max_window_layers": 24, "sliding_window": 32768},
        **{"use_mrope": False, "use_sliding_window": False, "tie_word_embeddings": True},
        **{"num_hidden_layers": 24, "rope_theta": 1000000.0, **RELEASE_4},
    },
    "gemma-2-9b": {
        **{
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
        },
        **{"final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        **{"sliding_window": 4096, "sliding_window_size": 4096, "rope_theta": 10000.0},
        **{"attention_bias": False, "attention_dropout": 0.0, **RELEASE_4},
    },
    "gemma-3-270m": {
        **{"_sliding_window_pattern": 6, "model_type": "gemma3_text", "num_hidden_layers": 18},
        **{"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
        **{"rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0},
        **{"use_bidirectional_attention": False, "attn_logit_softcapping": None, **RELEASE_4},
    },
    "stablelm-2": {
        **{"model_type": "stablelm", "partial_rotary_factor": 0.25, "rope_theta": 10000},
        **{"use_qkv_bias": True, "layer_norm_eps": 1e-05, "num_key_value_heads": 32, **RELEASE_4},
    },
    "opt-1.3b": {
        **{"model_type": "opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0},
        **{"activation_function": "relu", "do_layer_norm_before": True, "dropout": 0.1},
        **{"ffn_dim": 3072, "init_std": 0.02, "layerdrop": 0.0, "prefix": "</s>"},
        **{"word_embed_proj_dim": 768, **RELEASE_4},
    },
}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        **{"architectures": ["CLIPModel"], "initializer_factor": 1.0, "model_type": "clip"},
        **{"logit_scale_init_value": 2.6592, "projection_dim": 768, "torch_dtype": "float32"},
        **{"text_config": LEGACY | {"model_type": "clip_text_model"}, "text_config_dict": None},
        **{"vision_config": LEGACY | CLIP_TOWER, "vision_config_dict": None},
    },
    "siglip-so400m": {
        **{"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip"},
        "text_config": {"model_type": "siglip_text_model", "hidden_size": 1152},
        "vision_config": {
            **{"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304},
            **{"model_type": "siglip_vision_model", "num_attention_heads": 16},
            **{"num_hidden_layers": 27, "patch_size": 14},
        },
    },
    "dinov2-large": {
        **{"apply_layernorm": True, "architectures": ["Dinov2Model"], "drop_path_rate": 0.0},
        **{"attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0},
        **{"image_size": 518, "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2"},
        **{"num_channels": 3, "out_features": ["stage12"], "out_indices": [12], "patch_size": 14},
        **{"qkv_bias": True, "reshape_hidden_states": True, "use_swiglu_ffn": False},
        **{"stage_names": ["stem"], "torch_dtype": "float32", "transformers_version": "4.31"},
    },
}


def folder_of(content: dict, path) -> HFFolder:
    (path / "config.json").write_text(json.dumps(content))
    return HFFolder(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_models(name, tmp_path):
    config = folder_of(PUBLISHED[name], tmp_path).config
    assert isinstance(config, MLLMConfig)
    assert bool(config.vision) == ("llava" in name)
    with pytest.raises(UserError, match="the setting novel=1 is not known here"):
        _ = folder_of(PUBLISHED[name] | {"novel": 1}, tmp_path).config


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tmp_path):
    assert load_vision_config(folder_of(ENCODERS[name], tmp_path)).image_size in (336, 384, 518)
    with pytest.raises(UserError, match="the setting novel=1 is not known here"):
        load_vision_config(folder_of(ENCODERS[name] | {"novel": 1}, tmp_path))


def test_a_whole_model_of_tinyllava_factory(tmp_path):
    content = {
        **{"architectures": ["TinyLlavaForConditionalGeneration"], "model_type": "tinyllava"},
        **{"auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"}, "cache_dir": None},
        **{"connector_type": "mlp2x_gelu", "hidden_size": 2560, "ignore_index": -100},
        **{"image_aspect_ratio": "square", "image_token_index": -200, "num_queries": 128},
        **{"llm_model_name_or_path": "microsoft/phi-2", "num_resampler_layers": 3},
        **{"pad_token": "<|endoftext|>", "pad_token_id": 50256, "resampler_hidden_size": 768},
        **{"text_config": PUBLISHED["phi-2"], "tokenizer_model_max_length": 3072},
        **{"tokenizer_name_or_path": "microsoft/phi-2", "tokenizer_padding_side": "right"},
        **{"tokenizer_use_fast": False, "tune_type_connector": "full", "tune_type_llm": "full"},
        **{"tune_type_vision_tower": "frozen", "tune_vision_tower_from_layer": 0},
        "vision_config": ENCODERS["siglip-so400m"]["vision_config"]
        | {"model_name_or_path": "google/siglip-so400m-patch14-384", "model_name_or_path2": ""},
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "patch"},
        **{"vision_hidden_size": 1152, "vision_model_name_or_path": "google/siglip", **RELEASE_4},
        **{"vision_model_name_or_path2": "", "vocab_size": 51200},
    }
    assert folder_of(content, tmp_path).config.visual_tokens == 728


def test_files_of_tokenizer_images_and_generation(tmp_path):
    files = {
        "tokenizer_config.json": {
            **{"add_bos_token": True, "add_eos_token": False, "add_prefix_space": None},
            **{"added_tokens_decoder": {}, "bos_token": "<s>", "image_token": "<image>"},
            **{"clean_up_tokenization_spaces": False, "eos_token": {"__type": "AddedToken"}},
            **{"extra_special_tokens": {}, "legacy": False, "model_max_length": 1e30},
            **{"pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaProcessor"},
            **{"sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"},
            **{"trust_remote_code": False, "use_default_system_prompt": False, "errors": "replace"},
            **{"split_special_tokens": False, "return_token_type_ids": False},
        },
        "preprocessor_config.json": {
            **{"_valid_processor_keys": ["images"], "crop_size": {"height": 336, "width": 336}},
            **{"do_center_crop": True, "do_convert_rgb": True, "do_normalize": True},
            **{"do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "resample": 3},
            **{"image_processor_type": "CLIPImageProcessor", "image_std": [0.5] * 3},
            **{"processor_class": "LlavaProcessor", "rescale_factor": 1 / 255},
            **{"feature_extractor_type": "CLIPFeatureExtractor", "size": {"shortest_edge": 336}},
        },
        "processor_config.json": {
            **{"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14},
            **{"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"},
        },
        "generation_config.json": {
            **{"_from_model_config": True, "bos_token_id": 1, "cache_implementation": "hybrid"},
            **{"do_sample": True, "eos_token_id": [1, 106], "max_length": 4096, "top_k": 64},
            **{"pad_token_id": 0, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05},
            "transformers_version": "4.50.0.dev0",
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    check_tokenizer(tmp_path, build_tokenizer())
    assert check_image_processor(tmp_path)
    defaults = read_generation_config(tmp_path)
    assert (defaults.eos_ids, defaults.repetition_penalty) == ((1, 106), 1.05)
