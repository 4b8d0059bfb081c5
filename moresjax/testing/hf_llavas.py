"""Tiny LLaVAs of `transformers`, our models with their weights, and prompts with 0 to 2 images."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    SiglipVisionConfig,
)

from moresjax.generation.hf_inputs import hf_batch
from moresjax.models.mllm import MLLM
from moresjax.testing.hf_llms import gemma2
from moresjax.weights.hf import build_mllm, config_from_hf, import_params

VOCAB, IMAGE_ID, PAD, NEW = 61, 60, 5, 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Images per row; the rows have different lengths.
IMAGES = (1, 0, 2, 1)


def oracle_of(family: str) -> LlavaForConditionalGeneration:
    text, vision = {
        "llama + clip": (LlamaConfig(**TEXT, num_key_value_heads=2), CLIPVisionConfig(**TOWER)),
        "phi + siglip": (
            PhiConfig(**TEXT, partial_rotary_factor=0.5, pad_token_id=PAD),
            SiglipVisionConfig(**TOWER),
        ),
        # Every other layer sees a window, the logits are capped.
        "gemma 2 + clip": (gemma2(vocab_size=VOCAB), CLIPVisionConfig(**TOWER)),
    }[family]
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default" if "clip" in family else "full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one_dimensional = parameter.ndim == 1
            mean = float(one_dimensional and "norm" in name and name.endswith("weight"))
            parameter.normal_(mean, 0.3 if one_dimensional else 0.25, generator=generator)
    model.generation_config.eos_token_id = None
    return model


@dataclasses.dataclass
class Case:
    """An oracle, our model with its weights, and prompts."""

    oracle: LlavaForConditionalGeneration
    model: MLLM
    rows: list[list[int]]
    pixels: list[np.ndarray]  # per row

    def arrays(self, chosen=None, left=True, extra=0):
        """Ids, mask and pixels of some rows with the conventions of `transformers`."""
        chosen = range(len(self.rows)) if chosen is None else chosen
        rows = [self.rows[i] for i in chosen]
        length = max(map(len, rows)) + extra
        ids, mask = np.full((len(rows), length), PAD), np.zeros((len(rows), length), int)
        for number, row in enumerate(rows):
            where = slice(length - len(row), None) if left else slice(len(row))
            ids[number, where], mask[number, where] = row, 1
        pixels = np.concatenate([self.pixels[i] for i in chosen])
        return ids, mask, pixels if len(pixels) else None

    def batch(self, **options):
        ids, mask, pixels = self.arrays(**options)
        return hf_batch(ids, mask, pixels, IMAGE_ID, self.model.config.visual_tokens)

    def expected(self, eos: list[int] | None = None, chosen=None, **options) -> np.ndarray:
        """What `transformers` generates, filled up with the pad id to NEW tokens."""
        ids, mask, pixels = (None if x is None else torch.tensor(x) for x in self.arrays(chosen))
        with torch.no_grad():
            out = self.oracle.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=PAD,
                **({} if pixels is None else {"pixel_values": pixels}),
                **options,
            )[:, ids.shape[1] :].numpy()
        return np.pad(out, ((0, 0), (0, NEW - out.shape[1])), constant_values=PAD)


def case_of(family: str) -> Case:
    oracle = oracle_of(family)
    hf = oracle.config.to_dict()
    config = config_from_hf(hf)
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    model = build_mllm(config, import_params(config, hf, tensors))
    rng = np.random.default_rng(1)
    rows, pixels = [], []
    for number, images in enumerate(IMAGES):
        row = rng.integers(1, IMAGE_ID, 2 + number).tolist()
        for _ in range(images):
            row += [IMAGE_ID] * config.visual_tokens + rng.integers(1, IMAGE_ID, 3).tolist()
        rows.append(row)
        pixels.append(rng.standard_normal((images, 3, 8, 8)).astype(np.float32))
    return Case(oracle, model, rows, pixels)
