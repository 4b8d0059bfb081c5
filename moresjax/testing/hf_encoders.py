"""Tiny vision encoders of `transformers`, and ours with their weights."""

from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moresjax.models.initialize import abstract_params, set_params
from moresjax.models.vision import VisionEncoder
from moresjax.weights.vision_folder import load_vision

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
MLP: dict[str, Any] = {"intermediate_size": 24}


def clip(**changes: Any) -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**{**SIZES, **MLP, **changes}))


def siglip(**changes: Any) -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**{**SIZES, **MLP, **changes}))


def dinov2(**changes: Any) -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**{**SIZES, "mlp_ratio": 3, **changes}))


def dinov2_with_registers(**changes: Any) -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**{**SIZES, "num_register_tokens": 5, **changes})
    )


ORACLES: dict[str, Any] = {
    "clip": clip,
    "siglip": siglip,
    "dinov2": dinov2,
    "dinov2, gated": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2, no bias": lambda: dinov2(qkv_bias=False),
    "dinov2, registers": dinov2_with_registers,
    "dinov2, registers, gated": lambda: dinov2_with_registers(use_swiglu_ffn=True),
}


def randomised(model, seed: int = 0):
    """Every parameter far from its start value, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = "lambda1" in name or ("norm" in name and name.endswith("weight"))
            parameter.normal_(float(one), 0.3, generator=generator)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def loaded(folder, **changes: Any) -> VisionEncoder:
    config, state = load_vision(folder, **changes)
    encoder = VisionEncoder(config)
    set_params(encoder, state, "here")
    assert abstract_params(encoder) == []
    return encoder


def images(count: int = 2, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)


def hidden_states(model, pixels) -> list[np.ndarray]:
    with torch.no_grad():
        out = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return [h.numpy() for h in out.hidden_states]
