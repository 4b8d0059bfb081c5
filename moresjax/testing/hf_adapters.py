"""Tiny models of `transformers` with adapters of `peft`, and ours with the same weights."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from moresjax.inference.model import Model
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import build_mllm, config_from_hf, import_params

VOCAB, IMAGE_ID = 31, 30
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


class AdaptedModel:
    """A random model of `transformers`, and ours with its weights.

    Args:
      kind: the class of the model.
      config: its configuration.
    """

    def __init__(self, kind: type[PreTrainedModel], config: PretrainedConfig) -> None:
        torch.manual_seed(0)
        self.oracle = kind(config).eval()
        for parameter in self.oracle.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        hf = config.to_dict()
        is_llava = hf["model_type"] == "llava"
        self.config = config_from_hf(hf) if is_llava else MLLMConfig(llm=decoder_config(hf))
        tensors = {name: x.numpy().copy() for name, x in self.oracle.state_dict().items()}
        self.state = import_params(self.config, hf, tensors)
        rng = np.random.default_rng(0)
        self.inputs: dict[str, Any] = {"input_ids": rng.integers(1, IMAGE_ID, (2, 7))}
        if is_llava:
            self.inputs["input_ids"][:, 1:5] = IMAGE_ID
            self.inputs["pixel_values"] = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)

    def ours(self) -> MLLM:
        """Our model with its weights."""
        return build_mllm(self.config, self.state)

    def adapted(self, config: peft.PeftConfig, scale: float = 0.2) -> torch.nn.Module:
        """A model of `peft` with noise on all that trains."""
        theirs = peft.get_peft_model(copy.deepcopy(self.oracle), copy.deepcopy(config)).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += scale * torch.randn_like(parameter)
        return theirs

    def from_folder(self, folder: Path) -> torch.nn.Module:
        """The model of `peft` that a folder makes of the base."""
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.oracle), folder).eval()

    def their_logits(self, model: torch.nn.Module) -> np.ndarray:
        """What a model of `transformers` or `peft` makes of the inputs."""
        inputs: Mapping[str, torch.Tensor] = {k: torch.tensor(x) for k, x in self.inputs.items()}
        with torch.no_grad():
            return model(**inputs).logits.numpy()

    def our_logits(self, mllm: MLLM) -> np.ndarray:
        """What our model makes of the inputs."""
        return np.asarray(Model(mllm, None).logits(image_token_id=IMAGE_ID, **self.inputs))


def adapted_llava() -> AdaptedModel:
    """A LLaVA of LLaMA and CLIP."""
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IMAGE_ID,
    )
    return AdaptedModel(LlavaForConditionalGeneration, config)
