"""Prompt and prefix tuning in an adapter folder of `peft`: one tensor, `prompt_embeddings`.

Axis legend: P virtual tokens, D hidden size, L layers, F features of all key heads.

    PROMPT_TUNING   [P, D]
    PREFIX_TUNING   [P, 2 L F]: keys of layer 0, values of layer 0, keys of layer 1, ...
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import VirtualTokens

TENSOR = "prompt_embeddings"
# The `peft_type` of each of our methods, and the method's site.
_METHODS = {
    "PROMPT_TUNING": ("prompt", "llm.embed"),
    "PREFIX_TUNING": ("prefix", "llm.block.kv"),
}
VIRTUAL_TOKEN_TYPES = tuple(_METHODS)
VIRTUAL_TOKEN_METHODS = tuple(method for method, _ in _METHODS.values())


def virtual_tokens_to_peft(
    mllm: MLLM, method: VirtualTokens
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensor and the settings of the attached prompt or prefix tuning."""
    key, _ = mllm.tuning.methods[0]
    kind = next(kind for kind, (name, _) in _METHODS.items() if name == method.name)
    (variables,) = mllm.tuning.params[key].values()
    params = {name: np.asarray(x[...]) for name, x in variables.items()}
    llm = mllm.config.llm
    if kind == "PROMPT_TUNING":
        tensor, width, heads = params["embedding"], llm.hidden_size, llm.num_heads
    else:
        tensor = _flat(params)
        width, heads = llm.linears()["k"][1], llm.num_kv_heads
    return {TENSOR: tensor}, {
        "peft_type": kind,
        "num_virtual_tokens": method.length,
        "num_transformer_submodules": 1,
        "num_layers": llm.num_layers,
        "token_dim": width,
        "num_attention_heads": heads,
    }


def virtual_tokens_from_peft(
    config: MLLMConfig, settings: Mapping[str, Any], tensor: np.ndarray, source: str
) -> Tuning:
    """The tuning with the content of a folder's tensor.

    Args:
      config: The model's configuration.
      settings: The content of `adapter_config.json`, whose type is one of `VIRTUAL_TOKEN_TYPES`.
      tensor: The folder's `prompt_embeddings`.
      source: The folder's name, for messages.

    Raises:
      UserError: for a tensor of another width than this model's.
    """
    kind = settings["peft_type"]
    name, site = _METHODS[kind]
    width, length = _width(kind, config.llm), settings.get("num_virtual_tokens")
    if tensor.ndim != 2 or tensor.shape[1] != width or len(tensor) != (length or len(tensor)):
        raise UserError(
            f"{source}: {TENSOR} has shape {tensor.shape}, the model needs "
            f"({length or 'length'}, {width})"
        )
    tuning = Tuning(f"{name}:length={len(tensor)}", config)
    tuning.initialize()
    params = {"embedding": tensor} if name == "prompt" else _by_layer(tensor, config.llm.num_layers)
    for leaf, x in params.items():
        tuning.params[name][site][leaf][...] = jnp.asarray(x)
    return tuning


def _width(kind: str, llm: DecoderConfig) -> int:
    if kind == "PROMPT_TUNING":
        return llm.hidden_size
    return 2 * llm.num_layers * llm.linears()["k"][1]


def _flat(params: Mapping[str, Float[np.ndarray, "L P F"]]) -> Float[np.ndarray, "P W"]:
    both = np.stack([params["k"], params["v"]], axis=1)  # [L, 2, P, F]
    return both.transpose(2, 0, 1, 3).reshape(both.shape[2], -1)


def _by_layer(
    tensor: Float[np.ndarray, "P W"], layers: int
) -> dict[str, Float[np.ndarray, "L P F"]]:
    both = tensor.reshape(len(tensor), layers, 2, -1).transpose(2, 1, 0, 3)
    return {"k": both[0], "v": both[1]}
