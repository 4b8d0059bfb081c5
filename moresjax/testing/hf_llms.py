"""Tiny LLMs of `transformers`, one per family and variant, with inputs for them."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import copy
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB, IMAGE_ID, PAD, WINDOW = 61, 60, 5, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


def opt(**changes: Any) -> OPTConfig:
    text: dict[str, Any] = {
        k: x for k, x in TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")
    }
    return OPTConfig(**(text | {"ffn_dim": 48, "word_embed_proj_dim": 32} | changes))


def gemma3(**changes: Any) -> Gemma3TextConfig:
    rope: dict[str, Any] = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    }
    own: dict[str, Any] = {
        "num_hidden_layers": 4,
        "sliding_window_pattern": 3,
        "sliding_window": WINDOW,
    }
    own |= {"head_dim": 12, "query_pre_attn_scalar": 20, "rope_parameters": rope}
    return Gemma3TextConfig(**(TEXT | own | changes))


def gemma2(**changes: Any) -> Gemma2Config:
    own: dict[str, Any] = {"sliding_window": WINDOW, "head_dim": 12, "query_pre_attn_scalar": 20}
    own |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return Gemma2Config(**(TEXT | own | changes))


def stablelm(**changes: Any) -> StableLmConfig:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
    }
    return StableLmConfig(**(TEXT | {"rope_parameters": rope} | changes))


def qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**(TEXT | changes))


FAMILIES: dict[str, Any] = {
    "llama 3": LlamaConfig(**TEXT, head_dim=16, rope_parameters=LLAMA3),
    "llama, linear": LlamaConfig(**TEXT, rope_parameters=LINEAR, tie_word_embeddings=True),
    "mistral": MistralConfig(**TEXT, sliding_window=WINDOW),
    "mistral, no window": MistralConfig(**TEXT, sliding_window=None),
    "qwen 2": qwen2(),
    "qwen 2, window": qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen 3": Qwen3Config(**TEXT, head_dim=12, tie_word_embeddings=True),
    "gemma": GemmaConfig(**TEXT, head_dim=12),
    "gemma 2": gemma2(),
    "gemma 3": gemma3(),
    "stablelm": stablelm(),
    "stablelm, biases, parallel": stablelm(use_qkv_bias=True, use_parallel_residual=True),
    "opt": opt(),
}
LOCAL = {"mistral": "l", "qwen 2, window": "ggl", "gemma 2": "lg", "gemma 3": "llg"}


def randomised(model, seed: int = 0):
    """Random matrices; norm scales and biases far from their start values, so that they show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std, mean = (0.2, 0.0) if parameter.ndim > 1 else (0.3, 0.0)
            # Gemma adds one to its scales, which therefore stay around zero.
            if "norm" in name and name.endswith("weight") and "Gemma" not in type(model).__name__:
                mean = 1.0
            parameter.normal_(mean, std, generator=generator)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def oracle_of(config):
    own = copy.deepcopy(config)  # a model writes its dtype into it
    return randomised(AutoModelForCausalLM.from_config(own, attn_implementation="eager"))


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask of unequal rows."""
    shape = len(rows), max(map(len, rows))
    ids, mask = np.full(shape, PAD, np.int64), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        where = slice(shape[1] - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


def text_rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(6, IMAGE_ID, n).tolist() for n in lengths]
