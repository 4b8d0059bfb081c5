"""Tiny LLaMAs, Phis and LLaVAs of `transformers`, ours with their weights, and prompts for them."""

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights

from moresjax.inference.model import Model
from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import (
    build_mllm,
    config_from_hf,
    import_params,
)

TOLERANCE = 1e-4
VOCAB, IMAGE_ID = 61, 60
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
LEFT, RIGHT = True, False


# The oracles


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**(TEXT | {"num_key_value_heads": 2, "rope_theta": 500.0} | changes))


def phi(**changes) -> PhiConfig:
    return PhiConfig(**(TEXT | {"partial_rotary_factor": 0.5, "pad_token_id": 0} | changes))


def clip(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**(TOWER | changes))


def siglip(**changes) -> SiglipVisionConfig:
    return SiglipVisionConfig(**(TOWER | changes))


def randomised(model, std: float = 0.15, seed: int = 0):
    """Random matrices; norm scales around one and biases far from zero, so that each one shows."""
    generator, width = torch.Generator().manual_seed(seed), 3**0.5 * std
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-width, width, generator=generator)
            else:
                mean = float("norm" in name and name.endswith("weight"))
                parameter.normal_(mean, 0.3, generator=generator)
    return model.eval()


def built(kind, config, **options):
    with no_init_weights():
        model = kind(config)
    model.tie_weights()
    return randomised(model, **options)


def llava(text, vision, **changes) -> LlavaForConditionalGeneration:
    options = {"image_token_index": IMAGE_ID} | changes
    config = LlavaConfig(text_config=text, vision_config=vision, **options)
    return built(LlavaForConditionalGeneration, config)


def imported(oracle) -> Model:
    """Our model with the oracle's weights, without a file between them."""
    hf = oracle.config.to_dict()
    is_llava = hf["model_type"] in ("llava", "vipllava")
    config = config_from_hf(hf) if is_llava else MLLMConfig(llm=decoder_config(hf))
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    return Model(build_mllm(config, import_params(config, hf, tensors)), None)


# Inputs


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask of unequal rows."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


def text_rows(*lengths: int, vocab: int = VOCAB - 1) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, vocab, n).tolist() for n in lengths]


def image_rows(images: tuple[int, ...], visual: int) -> list[list[int]]:
    """Rows with that many images each and text before, between and after them."""
    rows = []
    for number, count in enumerate(images):
        first, *others = text_rows(2 + number, *[3] * count)
        rows.append(first + [i for text in others for i in [IMAGE_ID] * visual + text])
    return rows


def pixels(count: int, size: int) -> np.ndarray | None:
    rng = np.random.default_rng(8)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32) if count else None


def assert_same_logits(oracle, ours: Model, ids, mask, images=None):
    extra = {} if images is None else {"pixel_values": torch.tensor(images)}
    with torch.no_grad():
        theirs = oracle(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **extra
        ).logits.numpy()
    logits = np.asarray(
        ours.logits(
            input_ids=ids, attention_mask=mask, pixel_values=images, image_token_id=IMAGE_ID
        )
    )
    assert logits.dtype == np.float32
    assert logits.shape == theirs.shape
    real = mask.astype(bool)
    assert theirs[real].std() > 0.2, "the oracle's logits say nothing"
    assert np.abs(logits - theirs)[real].max() <= TOLERANCE


LLMS = {
    "llama": (LlamaForCausalLM, llama()),
    "llama, tied": (LlamaForCausalLM, llama(tie_word_embeddings=True)),
    "llama, biases and wide heads": (
        LlamaForCausalLM,
        llama(attention_bias=True, mlp_bias=True, head_dim=12),
    ),
    "phi": (PhiForCausalLM, phi(hidden_size=80, partial_rotary_factor=0.4, rope_theta=300.0)),
}


LLAVAS = {
    "llama + clip": (llama(), clip()),
    "phi + siglip": (phi(), siglip()),
}
