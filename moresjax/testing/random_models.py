"""Random tiny configurations of `transformers`: every LLM family that is read here, and LLaVAs.

Most values are ones that the families support; some are not, and must be refused.
"""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import random
from typing import Any

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

VOCAB, IMAGE_ID, PAD, SIDE = 32, 31, 0, 8
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "stablelm",
    "opt",
)
TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")
KNOWN = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu")
UNKNOWN = ("mish", "tanh", "gelu_fast", "relu2")
KINDS = ("default", "linear", "llama3", "dynamic", "yarn")
TYPES = ("sliding_attention", "full_attention")


class Draws(random.Random):
    """Random choices, of which those of sizes may always be the first one.

    Args:
      seed: What the choices depend on.
      few_sizes: Whether all models shall have the same sizes: JAX then has less to compile.
    """

    def __init__(self, seed: str, few_sizes: bool = False) -> None:
        super().__init__(seed)
        self._few_sizes = few_sizes

    def size(self, *sizes: int) -> int:
        """One of the sizes."""
        return sizes[0] if self._few_sizes else self.choice(sizes)


def some(rng: Draws, share: float, value: Any, other: Any) -> Any:
    """The value in a share of the cases, else the other one."""
    return value if rng.random() < share else other


def random_model(rng: Draws) -> PreTrainedConfig:
    """An LLM, or in a third of the cases a LLaVA."""
    return some(rng, 1 / 3, random_llava, random_llm)(rng)


def random_llm(rng: Draws) -> PreTrainedConfig:
    """An LLM of a random family."""
    family = rng.choice(FAMILIES)
    text: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": rng.size(2, 1, 3),
        "num_attention_heads": 4,
        "num_key_value_heads": rng.size(2, 1, 4),
        "max_position_embeddings": 64,
        "tie_word_embeddings": rng.random() < 0.4,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(family, **_FIELDS[family](rng, text))


def _activation(rng: Draws, usual: str) -> str:
    return some(rng, 0.6, usual, rng.choice(some(rng, 0.93, KNOWN, UNKNOWN)))


def _eps(rng: Draws) -> float:
    return rng.choice((1e-6, 1e-5, 1e-2))


def _rope(rng: Draws, partial: float | None = None) -> dict[str, Any]:
    kind = rng.choices(KINDS, (60, 20, 20, 1, 1))[0]
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice((100.0, 1e4, 1e6))}
    if kind != "default":
        rope["factor"] = rng.choice((2.0, 8.0))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = rng.choice((8, 32))
    return rope if partial is None else rope | {"partial_rotary_factor": partial}


def _llama(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    return text | {
        "head_dim": rng.size(4, 8),
        "hidden_act": _activation(rng, "silu"),
        "rms_norm_eps": _eps(rng),
        "rope_parameters": _rope(rng, some(rng, 0.01, 0.5, None)),
    }


def _biases(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    own = {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}
    return _llama(rng, text) | own


def _mistral(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    return _llama(rng, text) | {"sliding_window": rng.choice((None, 3))}


def _layers(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    """Which layers see a window, given in one of the ways there are."""
    window: dict[str, Any] = {"sliding_window": rng.choice((2, 4))}
    if rng.random() < 0.5:
        window["layer_types"] = [rng.choice(TYPES) for _ in range(text["num_hidden_layers"])]
    return window


def _qwen2(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    own = {"use_sliding_window": rng.random() < 0.5, "max_window_layers": rng.choice((0, 1, 28))}
    return _llama(rng, text) | _layers(rng, text) | own


def _qwen3(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    return _qwen2(rng, text) | {"attention_bias": rng.random() < 0.3}


def _gemma(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    own = {"hidden_act": _activation(rng, "gelu_pytorch_tanh")}
    own["attention_bias"] = rng.random() < 0.3
    bidirectional = some(rng, 0.02, {"use_bidirectional_attention": True}, {})
    return _llama(rng, text) | own | bidirectional


def _gemma2(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    own = {
        "query_pre_attn_scalar": rng.choice((8, 20)),
        "attn_logit_softcapping": rng.choice((None, 2.0, 50.0)),
        "final_logit_softcapping": rng.choice((None, 3.0, 30.0)),
    }
    fields = _gemma(rng, text) | _layers(rng, text) | own
    return fields | {"hidden_activation": fields.pop("hidden_act")}


def _gemma3(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": rng.choice((10.0, 1e4))}
    local |= some(rng, 0.05, {"rope_type": "linear", "factor": 2.0}, {})
    ropes = {"full_attention": _rope(rng), "sliding_attention": local}
    fields = _gemma2(rng, text) | {"rope_parameters": ropes}
    if "layer_types" not in fields:
        fields["sliding_window_pattern"] = rng.choice((2, 3))
    return fields


def _phi(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    return text | {
        "hidden_act": _activation(rng, "gelu_new"),
        "layer_norm_eps": _eps(rng),
        "rope_parameters": _rope(rng, rng.choice((0.5, 1.0))),
        "qk_layernorm": rng.random() < 0.05,
    }


def _stablelm(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    own = {
        "use_qkv_bias": rng.random() < 0.5,
        "use_parallel_residual": rng.random() < 0.5,
        "hidden_act": _activation(rng, "silu"),
    }
    fields = _phi(rng, text)
    return fields | own


def _opt(rng: Draws, text: dict[str, Any]) -> dict[str, Any]:
    without = ("intermediate_size", "num_key_value_heads")
    kept = {key: value for key, value in text.items() if key not in without}
    return kept | {
        "ffn_dim": 24,
        "word_embed_proj_dim": some(rng, 0.05, 8, 16),
        "activation_function": _activation(rng, "relu"),
        "enable_bias": rng.random() < 0.7,
        "do_layer_norm_before": rng.random() < 0.95,
        "layer_norm_elementwise_affine": rng.random() < 0.95,
        "_remove_final_layer_norm": rng.random() < 0.05,
    }


_FIELDS = {
    "llama": _biases,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "stablelm": _stablelm,
    "opt": _opt,
}


def random_tower(rng: Draws) -> PreTrainedConfig:
    """A vision encoder for images of 8 x 8 pixels."""
    family = rng.choices(TOWERS, (5, 4, 1))[0]
    tower: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": rng.size(2, 3),
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "layer_norm_eps": _eps(rng),
        "hidden_act": _activation(rng, "quick_gelu" if "clip" in family else "gelu"),
    }
    if family == "dinov2":
        own: dict[str, Any] = {"mlp_ratio": 2, "qkv_bias": rng.random() < 0.7}
        own["use_swiglu_ffn"] = rng.random() < 0.3
    else:
        own = {"intermediate_size": 12}
    if family.startswith("siglip"):
        own["vision_use_head"] = rng.random() < 0.5
    return AutoConfig.for_model(family, **tower, **own)


def random_llava(rng: Draws) -> LlavaConfig:
    """A LLaVA of a random LLM and a random vision encoder."""
    vision = random_tower(rng)
    layers = vision.num_hidden_layers
    several = ([-2, -1], [1], [layers, 0], [-1, 1, -2])
    layer = rng.choice((layers, 1, *several) if rng.random() < 0.25 else (-1, -2))
    text = random_llm(rng)
    # The wrapper would tie its head to a place where OPT has no embedding.
    tied = text.model_type != "opt" and some(rng, 0.8, text.tie_word_embeddings, False)
    text.tie_word_embeddings = tied if text.model_type == "opt" else text.tie_word_embeddings
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=rng.choice(("default", "full")),
        projector_hidden_act=_activation(rng, "gelu"),
        multimodal_projector_bias=rng.random() < 0.97,
        tie_word_embeddings=tied,
    )
