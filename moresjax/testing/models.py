"""Models of a few thousand parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moresjax.core.parameter_names import named_parameters
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.inference.model import Model
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig

TINY_LLM: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}
TINY_VISION: dict[str, Any] = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
}


def tiny_config(**llm: Any) -> MLLMConfig:
    """A LLaMA-type MLLM: 3 decoder layers, 16 features, 9 visual tokens per image.

    Args:
      llm: fields of `DecoderConfig` that are to be different.
    """
    return MLLMConfig(
        llm=DecoderConfig(**(TINY_LLM | llm)),
        vision=VisionConfig(**TINY_VISION),
        connector="mlp2x_gelu",
    )


def tiny_model(tuning: str = "none", seed: int = 0, **llm: Any) -> MLLM:
    """A `tiny_config` module with initial weights.

    Args:
      tuning: spec string of the attached tuning.
      seed: seeds the weights.
      llm: fields of `DecoderConfig` that are to be different.

    >>> from moresjax.testing import tiny_model
    >>> tiny_model("mores:rank=1").config.visual_tokens
    9
    """
    graph, state = nnx.split(_tiny_model(tuning, seed, tuple(llm.items())))
    return nnx.merge(
        graph, jax.tree.map(jnp.copy, state)
    )  # arrays of its own: a step may donate them


@functools.cache
def _tiny_model(tuning: str, seed: int, llm: tuple[tuple[str, Any], ...]) -> MLLM:
    """Nobody changes this one: making it takes ten times as long as a copy."""
    model = MLLM(tiny_config(**dict(llm)), tuning)
    initialize(model, seed)
    return model


def randomised_tuning(model: MLLM, seed: int = 1, scale: float = 0.2) -> MLLM:
    """The model itself, noise added to every parameter of its tuning: no method does nothing.

    Args:
      model: the tuned model.
      seed: seeds the noise.
      scale: its standard deviation.

    >>> from moresjax.testing import tiny_model
    >>> randomised_tuning(tiny_model("lora:rank=2")).tuning.spec
    'lora:rank=2'
    """
    rng = np.random.default_rng(seed)
    for variable in named_parameters(model.tuning).values():
        noise = scale * rng.standard_normal(variable.shape)
        variable.set_value(variable.get_value() + noise.astype(np.float32))
    return model


def digits_processor() -> Processor:
    """The digits world's tokenizer with the image processor that `tiny_config` needs."""
    return Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)


def talking_model(tuning: str = "none", **llm: Any) -> Model:
    """A model of two layers that says several words of the digits world.

    As they start, tiny models say one word only and some methods do nothing. Here the weights are
    larger, and the parameters of the tuning are drawn.

    Args:
      tuning: spec string of the attached tuning.
      llm: fields of `DecoderConfig` that are to be different.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("mores:rank=1")
    >>> isinstance(model.generate("how many ?", max_new_tokens=2), str)
    True
    """
    mllm = tiny_model(tuning, vocab_size=len(vocabulary()), num_layers=2, **llm)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: 12 * x, nnx.state(mllm, nnx.Param))
    state["tuning"] = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), state.get("tuning", {})
    )
    nnx.update(mllm, state)
    return Model(mllm, digits_processor())


def terse_model() -> Model:
    """A `talking_model` without tuning that ends its answers, where it would say hundreds of words.

    >>> from moresjax.testing import terse_model
    >>> isinstance(terse_model().generate("how many ?", max_new_tokens=2), str)
    True
    """
    model = talking_model()
    kernel = model._mllm.llm.head.kernel  # pyright: ignore[reportOptionalMemberAccess]
    end = model.processor.tokenizer.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    kernel[...] = kernel[...].at[:, end].multiply(3)
    return model
