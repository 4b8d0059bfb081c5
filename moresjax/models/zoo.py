"""Named sizes. A new one is one entry: name -> configuration."""

import dataclasses
from typing import Any

from moresjax.core.errors import choice_error
from moresjax.models.decoder import DecoderConfig
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import (
    EVA,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    VisionConfig,
)


def _llama(hidden: int, mlp: int, layers: int, heads: int, **changes: Any) -> DecoderConfig:
    """LLaMA's wiring: RMSNorm, rotary positions, a gated MLP, no biases."""
    defaults = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "norm_eps": 1e-5,
        "max_positions": 4096,
    }
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        **(defaults | changes),
    )


def _phi(hidden: int, layers: int, heads: int, rotary: float) -> DecoderConfig:
    """Phi's wiring: attention and MLP in parallel, LayerNorm, biases, partly rotated heads."""
    return DecoderConfig(
        model_type="phi",
        vocab_size=51_200,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        rotary_fraction=rotary,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        parallel=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


def _clip(image: int, patch: int, hidden: int, layers: int) -> VisionConfig:
    """CLIP's wiring: a class token, a norm before the first block, heads of 64 features."""
    return VisionConfig(
        model_type="clip_vision_model",
        image_size=image,
        patch_size=patch,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        activation="quick_gelu",
        pixel_mean=OPENAI_MEAN,
        pixel_std=OPENAI_STD,
    )


def _siglip(
    image: int, patch: int, hidden: int = 768, mlp: int = 3072, layers: int = 12, heads: int = 12
) -> VisionConfig:
    """SigLIP's wiring: patches only."""
    return VisionConfig(
        model_type="siglip_vision_model",
        image_size=image,
        patch_size=patch,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        norm_eps=1e-6,
        activation="gelu_tanh",
    )


def _dinov2(hidden: int, layers: int, image: int = 518, **changes: Any) -> VisionConfig:
    """DINOv2's wiring: a class token and layer scale."""
    defaults = {
        "model_type": "dinov2",
        "intermediate_size": 4 * hidden,
        "activation": "gelu",
    }
    return VisionConfig(
        image_size=image,
        patch_size=14,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        norm_eps=1e-6,
        class_token=True,
        layer_scale=True,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        **(defaults | changes),
    )


def _eva(image: int) -> VisionConfig:
    """EVA-ViT-g as MiniGPT-v2 has it: heads of 88 features, keys without a bias.

    The last of its 40 blocks is left out, and a norm of MiniGPT-v2's own follows (`ln_vision`).
    """
    return VisionConfig(
        model_type=EVA,
        image_size=image,
        patch_size=14,
        hidden_size=1408,
        intermediate_size=6144,
        num_layers=39,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu",
        class_token=True,
        k_bias=False,
        feature_layer=-1,
        feature_norm_eps=1e-5,
        pixel_mean=OPENAI_MEAN,
        pixel_std=OPENAI_STD,
    )


_LLAMA3_ROPE = {
    "vocab_size": 128_256,
    "max_positions": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": "llama3",
    "rope_original_positions": 8192,
}


def _qwen(hidden: int, mlp: int, layers: int, heads: int, **changes: Any) -> DecoderConfig:
    """LLaMA's wiring with Qwen's vocabulary and slower rotations."""
    defaults = {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
    }
    return _llama(hidden, mlp, layers, heads, **(defaults | changes))


def _gemma(hidden: int, mlp: int, layers: int, heads: int, **changes: Any) -> DecoderConfig:
    """Gemma's wiring: norms scaled by 1 + s, scaled and tied embeddings, heads of 256 features."""
    defaults = {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "head_dim": 256,
        "norm_eps": 1e-6,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "tie_embeddings": True,
        "max_positions": 8192,
    }
    return _llama(hidden, mlp, layers, heads, **(defaults | changes))


def _gemma3(hidden: int, mlp: int, layers: int, heads: int, **changes: Any) -> DecoderConfig:
    """Gemma 3: every sixth layer sees everything, queries and keys are normalised."""
    defaults = {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "max_positions": 32_768,
        "qk_norm": True,
        "post_norms": True,
        "query_scale": 256**-0.5,
        "window": 512,
        "attention_pattern": "lllllg",
        "rope_theta": 1_000_000.0,
        "local_rope_theta": 10_000.0,
    }
    return _gemma(hidden, mlp, layers, heads, **(defaults | changes))


# Gemma 3 with images.
_GEMMA3_IMAGES = {
    "vocab_size": 262_208,
    "max_positions": 131_072,
    "window": 1024,
    "rope_scaling": "linear",
    "rope_factor": 8.0,
    "image_attention": "bidirectional",
}


def _opt(hidden: int, layers: int, heads: int) -> DecoderConfig:
    """OPT's wiring: learned positions, LayerNorm, biases, an MLP without a gate."""
    return DecoderConfig(
        model_type="opt",
        vocab_size=50_272,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        positions="learned",
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    )


# Positional arguments are the hidden size, the MLP size, the number of layers and of heads.
LLMS: dict[str, DecoderConfig] = {
    "gemma-2b": _gemma(2048, 16_384, 18, 8, num_kv_heads=1),
    "gemma-2-2b": _gemma(
        2304,
        9216,
        26,
        8,
        num_kv_heads=4,
        post_norms=True,
        query_scale=256**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        window=4096,
        attention_pattern="lg",
        model_type="gemma2",
    ),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, num_kv_heads=1),
    "gemma-3-4b-llm": _gemma3(2560, 10_240, 34, 8, num_kv_heads=4, **_GEMMA3_IMAGES),
    "gemma-3-12b-llm": _gemma3(3840, 15_360, 48, 16, num_kv_heads=8, **_GEMMA3_IMAGES),
    "gemma-3-27b-llm": _gemma3(
        *(5376, 21_504, 62, 32),
        num_kv_heads=16,
        head_dim=128,
        **(_GEMMA3_IMAGES | {"query_scale": 168**-0.5}),
    ),
    "llama-2-7b": _llama(4096, 11_008, 32, 32),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, num_kv_heads=8, rope_factor=8.0, **_LLAMA3_ROPE),
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, num_kv_heads=8, rope_factor=32.0, tie_embeddings=True, **_LLAMA3_ROPE
    ),
    "mistral-7b": _llama(  # v0.1
        4096,
        14_336,
        32,
        32,
        num_kv_heads=8,
        max_positions=32_768,
        window=4096,
        attention_pattern="l",
        model_type="mistral",
    ),
    "opt-125m": _opt(768, 12, 12),
    "opt-6.7b": _opt(4096, 32, 32),
    "phi-1.5": _phi(2048, 24, 32, 0.5),
    "phi-2": _phi(2560, 32, 32, 0.4),
    "qwen2.5-0.5b": _qwen(
        896, 4864, 24, 14, num_kv_heads=2, qkv_bias=True, tie_embeddings=True, max_positions=32_768
    ),
    "qwen2.5-7b": _qwen(
        3584,
        18_944,
        28,
        28,
        num_kv_heads=4,
        vocab_size=152_064,
        qkv_bias=True,
        max_positions=131_072,
    ),
    "qwen3-0.6b": _qwen(
        1024,
        3072,
        28,
        16,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        tie_embeddings=True,
        max_positions=40_960,
        model_type="qwen3",
    ),
    "qwen3-8b": _qwen(
        4096,
        12_288,
        36,
        32,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        max_positions=40_960,
        model_type="qwen3",
    ),
    "stablelm-2-1.6b": _llama(
        2048,
        5632,
        24,
        32,
        vocab_size=100_352,
        norm="layer",
        rotary_fraction=0.25,
        qkv_bias=True,
        model_type="stablelm",
    ),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, num_kv_heads=4, max_positions=2048),
    "vicuna-7b": _llama(4096, 11_008, 32, 32),
    "vicuna-13b": _llama(5120, 13_824, 40, 40),
}

# CLIP and SigLIP: image size, patch size, hidden size, (SigLIP: MLP size,) layers, (heads).
VISION: dict[str, VisionConfig] = {
    "clip-b-16-224": _clip(224, 16, 768, 12),
    "clip-l-14-224": _clip(224, 14, 1024, 24),
    "clip-l-14-336": _clip(336, 14, 1024, 24),
    # SigLIP2's checkpoints of a fixed resolution have these sizes too.
    "siglip-b-16-224": _siglip(224, 16),
    "siglip-b-16-256": _siglip(256, 16),
    "siglip-b-16-384": _siglip(384, 16),
    "siglip-l-16-256": _siglip(256, 16, 1024, 4096, 24, 16),
    "siglip-l-16-384": _siglip(384, 16, 1024, 4096, 24, 16),
    "siglip-so400m-14-224": _siglip(224, 14, 1152, 4304, 27, 16),
    "siglip-so400m-14-384": _siglip(384, 14, 1152, 4304, 27, 16),
    # As TinyLLaVA Factory and LLaVA Steering read it: without the first of its 729 tokens.
    "siglip-so400m-14-384-728": dataclasses.replace(
        _siglip(384, 14, 1152, 4304, 27, 16), drop_first_token=True
    ),
    # As Gemma 3 reads it: the last layer behind its norm.
    "siglip-so400m-14-896": dataclasses.replace(
        _siglip(896, 14, 1152, 4304, 27, 16), feature_layer=-1, feature_norm_eps=1e-6
    ),
    "dinov2-s-14": _dinov2(384, 12),
    "dinov2-b-14": _dinov2(768, 12),
    "dinov2-l-14": _dinov2(1024, 24),
    "dinov2-g-14": _dinov2(1536, 40, intermediate_size=4096, activation="silu", gated_mlp=True),
    "dinov2-reg4-b-14": _dinov2(768, 12, registers=4, model_type="dinov2_with_registers"),
    "dinov2-reg4-l-14": _dinov2(1024, 24, registers=4, model_type="dinov2_with_registers"),
    "eva-g-14-448": _eva(448),
}

# Two encoders at one image size. DINOv2 is published at 518 pixels only: its positions at these
# sizes are new.
FUSED_VISION: dict[str, FusedVisionConfig] = {
    "mof-l-14-336": FusedVisionConfig(
        encoders=(VISION["clip-l-14-336"], _dinov2(1024, 24, 336)), fusion="interleave"
    ),
    "dinov2-siglip-so400m-14-384": FusedVisionConfig(
        encoders=(_dinov2(1024, 24, 384), VISION["siglip-so400m-14-384"]), fusion="channels"
    ),
}
ENCODERS: dict[str, AnyVisionConfig] = VISION | FUSED_VISION

# Whole models: LLM, encoder and connector.
MODELS: dict[str, tuple[str, str, str]] = {
    "llava-steering-3b": ("phi-2", "siglip-so400m-14-384-728", "mlp2x_gelu"),
    "llava-steering-7b": ("vicuna-7b", "clip-l-14-336", "mlp2x_gelu"),
    "llava-steering-13b": ("vicuna-13b", "clip-l-14-336", "mlp2x_gelu"),
    "llava-1.5-7b": ("vicuna-7b", "clip-l-14-336", "mlp2x_gelu"),
    "llava-1.5-13b": ("vicuna-13b", "clip-l-14-336", "mlp2x_gelu"),
    "minigpt-v2": ("llama-2-7b", "eva-g-14-448", "concat4-linear"),
    **{
        f"gemma-3-{size}": (
            *(f"gemma-3-{size}-llm", "siglip-so400m-14-896"),
            "pool4-rmsnorm-linear-nobias",
        )
        for size in ("4b", "12b", "27b")
    },
}


def mllm_config(
    llm: str, vision: str | None = None, connector: str = "", **changes: Any
) -> MLLMConfig:
    """The configuration of parts that have names.

    >>> config = mllm_config("vicuna-7b", "clip-l-14-336", dtype="bfloat16")
    >>> config.llm.num_layers, config.visual_tokens
    (32, 576)
    >>> config == mllm_config("llava-1.5-7b", dtype="bfloat16")
    True

    Args:
      llm: The name of an LLM, or of a whole model (`MODELS`), which has encoder and connector.
      vision: The name of an encoder; None for a plain LLM.
      connector: The connector between the two; default: the whole model's, else `mlp2x_gelu`.
      **changes: Fields of the LLM with other values than the named ones, such as `dtype`, `remat`
        and `unroll`.

    Raises:
      UserError: for an unknown name.
    """
    if llm in MODELS and vision is None:
        llm, vision, own = MODELS[llm]
        connector = connector or own
    if llm not in LLMS:
        raise choice_error("LLM", llm, (*LLMS, *(MODELS if vision is None else ())))
    if vision is not None and vision not in ENCODERS:
        raise choice_error("vision encoder", vision, ENCODERS)
    return MLLMConfig(
        llm=dataclasses.replace(LLMS[llm], **changes),
        vision=ENCODERS[vision] if vision else None,
        connector=connector or "mlp2x_gelu",
    )
