"""Named sizes are those of published checkpoints; at full width the logits are the same, too."""

import json

import pytest
import torch
from hf_models import assert_same_logits, imported
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)
from transformers.initialization import no_init_weights

from moresjax.models.count import count_parameters
from moresjax.models.decoder import DecoderConfig
from moresjax.models.zoo import LLMS, mllm_config
from moresjax.testing.hf_llms import (
    LLAMA3,
    PAD,
    WINDOW,
    oracle_of,
    padded,
    text_rows,
)
from moresjax.weights.families.base import decoder_config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("gemma-2b", 2_506_172_416),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b", 999_885_952),
        ("stablelm-2-1.6b", 1_644_515_328),
        ("opt-125m", 125_239_296),
        ("opt-6.7b", 6_658_473_984),
        ("phi-1.5", 1_418_270_720),
    ],
)
def test_sizes(name, parameters):
    report = count_parameters(mllm_config(name), also_train=())
    assert report.components["llm"].total == parameters


# What the `config.json` of each published checkpoint says, beyond its family's defaults.
PUBLISHED = {
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3
        | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
    ),
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3
        | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192, "factor": 32.0},
    ),
    "mistral-7b": MistralConfig(max_position_embeddings=32_768, rms_norm_eps=1e-5),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1e6,
        sliding_window=32_768,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1e6,
        max_position_embeddings=131_072,
        sliding_window=131_072,
        vocab_size=152_064,
    ),
    "qwen3-0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": Qwen3Config(
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=40_960,
    ),
    "gemma-2b": GemmaConfig(
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
    ),
    "gemma-2-2b": Gemma2Config(),
    "gemma-3-1b": Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=32_768,
        sliding_window=512,
        rope_theta=1e6,
        rope_local_base_freq=10_000.0,
    ),
    "stablelm-2-1.6b": StableLmConfig(
        vocab_size=100_352,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        use_qkv_bias=True,
    ),
    "opt-125m": OPTConfig(),
    "phi-1.5": PhiConfig(),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_sizes_are_the_published_ones(name):
    found = decoder_config(PUBLISHED[name].to_dict())
    assert found == LLMS[name]
    assert found.model_type == LLMS[name].model_type == PUBLISHED[name].model_type


# Wide heads, grouped keys and norms as published; two layers and a short vocabulary.
@pytest.mark.parametrize("name", ["qwen3-8b", "gemma-3-1b"])
def test_full_width_logits(name):
    short = {"vocab_size": 128, "num_hidden_layers": 2, "pad_token_id": PAD, "layer_types": None}
    local = {"sliding_window_pattern": 2, "sliding_window": WINDOW} if "gemma" in name else {}
    config = PUBLISHED[name].to_dict() | short | local
    config.pop("_sliding_window_pattern", None)
    with no_init_weights():
        oracle = oracle_of(type(PUBLISHED[name])(**config))
    oracle.tie_weights()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.15)
    assert_same_logits(oracle, imported(oracle), *padded(text_rows(10, 7), left=True))


@pytest.mark.parametrize("name", LLMS)
def test_named_configs_survive_json(name):
    config = mllm_config(name)
    again = DecoderConfig(**json.loads(json.dumps(config.to_dict()))["llm"])
    assert again == config.llm
    assert hash(again) == hash(config.llm)
