"""Named sizes. A new one is one entry: name -> configuration."""

import dataclasses

from moresjax.errors import choice_error
from moresjax.models.connector import connector_depth
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig


def _llama(hidden: int, mlp: int, layers: int, heads: int, **changes) -> DecoderConfig:
    defaults = {"vocab_size": 32_000, "norm_eps": 1e-5, "max_positions": 4096}
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        **(defaults | changes),
    )


def _phi(hidden: int, layers: int, heads: int, rotary: float) -> DecoderConfig:
    return DecoderConfig(
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
    return VisionConfig(
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
    )


LLMS: dict[str, DecoderConfig] = {
    "phi-2": _phi(2560, 32, 32, 0.4),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, num_kv_heads=4, max_positions=2048),
    "vicuna-7b": _llama(4096, 11_008, 32, 32),
    "vicuna-13b": _llama(5120, 13_824, 40, 40),
}

VISION: dict[str, VisionConfig] = {
    "clip-b-16-224": _clip(224, 16, 768, 12),
    "clip-l-14-224": _clip(224, 14, 1024, 24),
    "clip-l-14-336": _clip(336, 14, 1024, 24),
    "siglip-so400m-14-384": VisionConfig(
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
    ),
}


def mllm_config(
    llm: str, vision: str | None = None, connector: str = "mlp2x_gelu", **changes
) -> MLLMConfig:
    """Configuration of named parts; `changes` go to the LLM (`dtype`, `remat`, `unroll`).

    Raises:
      UserError: for an unknown name.
    """
    if llm not in LLMS:
        raise choice_error("LLM", llm, LLMS)
    if vision is not None and vision not in VISION:
        raise choice_error("vision encoder", vision, VISION)
    connector_depth(connector)
    return MLLMConfig(
        llm=dataclasses.replace(LLMS[llm], **changes),
        vision=VISION[vision] if vision else None,
        connector=connector,
    )
