"""The dtype that a model computes in, beside that of its weights."""

import dataclasses

import jax

from moresjax.core.errors import choice_error
from moresjax.models.layers import DTYPES
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig

DTYPE_CHOICES = ("auto", "stored", *DTYPES)


def compute_dtype(choice: str, stored: str) -> str:
    """The dtype of activations for an option and the dtype that weights are stored in.

    >>> compute_dtype("auto", "bfloat16")  # on a CPU; "bfloat16" on a TPU or GPU
    'float32'
    >>> compute_dtype("stored", "bfloat16")
    'bfloat16'

    Args:
      choice: `auto` is float32 on CPUs and `stored` elsewhere; `stored`, or a dtype.
      stored: The dtype of the weights. TPUs have no float16: theirs is bfloat16.

    Raises:
      UserError: for another choice.
    """
    if choice not in DTYPE_CHOICES:
        raise choice_error("dtype", choice, DTYPE_CHOICES)
    device = jax.default_backend()
    if choice == "auto":
        choice = "float32" if device == "cpu" else "stored"
    if choice == "stored":
        choice = stored if stored in DTYPES else "float32"
        choice = "bfloat16" if (choice, device) == ("float16", "tpu") else choice
    return choice


def with_dtype(config: MLLMConfig, dtype: str) -> MLLMConfig:
    """The model with activations of that dtype in all parts."""
    llm, vision = dataclasses.replace(config.llm, dtype=dtype), config.vision
    if isinstance(vision, VisionConfig):
        vision = dataclasses.replace(vision, dtype=dtype)
    return dataclasses.replace(config, llm=llm, vision=vision)
