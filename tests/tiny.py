"""Tiny models, layouts and batches, shared by the tests."""

import jax
import numpy as np
from flax import nnx

from moresjax.core.layout import Batch, TokenKind, TokenLayout
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.inference.model import Model
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig

TINY_LLM = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}
TINY_VISION = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
}


def tiny_config(**llm) -> MLLMConfig:
    """A LLaMA-type MLLM: 3 decoder layers, 16 features, 9 visual tokens per image."""
    return MLLMConfig(
        llm=DecoderConfig(**(TINY_LLM | llm)),
        vision=VisionConfig(**TINY_VISION),
        connector="mlp2x_gelu",
    )


def tiny_model(tuning: str = "none", seed: int = 0, **llm) -> MLLM:
    """An initialised `tiny_config` model."""
    return initialize(MLLM(tiny_config(**llm), tuning), seed)


def talking_model(tuning: str, **llm) -> Model:
    """A tiny model of two layers with the words of the digits. As they start, models say one word
    only and some methods do nothing: here weights are larger, and those of the methods drawn."""
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    mllm = tiny_model(tuning, vocab_size=len(vocabulary()), num_layers=2, **llm)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: 12 * x, nnx.state(mllm, nnx.Param))
    state["tuning"] = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), state.get("tuning", {})
    )
    nnx.update(mllm, state)
    return Model(mllm, processor)


def row_layout(*pieces: tuple[TokenKind, int], length: int = 0, left: bool = False):
    """Layout fields of one row from (kind, tokens) runs, padded to `length` on one side."""
    kind = [int(s) for s, n in pieces for _ in range(n)]
    pad = max(length - len(kind), 0)
    images = iter(range(len(kind)))
    fields = {
        "kind": kind,
        "image": [next(images) if s == TokenKind.IMAGE else -1 for s in kind],
        "position": list(range(len(kind))),
        "document": [0] * len(kind),
        "branch": [0] * len(kind),
    }
    fill = {"image": -1}
    rows = {}
    for name, values in fields.items():
        padding = [fill.get(name, 0)] * pad
        rows[name] = np.asarray(padding + values if left else values + padding, np.int32)
    return rows


def stack_layout(rows, visual: int = 9) -> TokenLayout:
    """A batch layout of equally long `row_layout` rows."""
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return TokenLayout.stacked(fields, visual)


def tiny_batch(rows: int = 2, images: int = 1, seed: int = 0, answer: int = 4) -> Batch:
    """BOS, `images` images, a question and an answer per row, right-padded; random contents."""
    rng = np.random.default_rng(seed)
    pieces = [(TokenKind.SYSTEM, 2), (TokenKind.IMAGE, 9 * images), (TokenKind.QUESTION, 3)]
    layouts = []
    for row in range(rows):
        # The last row is one token shorter, so that there is padding.
        last = answer - (row == rows - 1 and rows > 1 and answer > 1)
        whole = [*pieces, (TokenKind.ANSWER, last)]
        layouts.append(row_layout(*whole, length=5 + 9 * images + answer))
    layout = stack_layout(layouts)
    tokens = rng.integers(1, TINY_LLM["vocab_size"], layout.shape).astype(np.int32)
    pixels = rng.standard_normal((rows, images, 12, 12, 3)).astype(np.float32)
    return Batch(tokens, layout, pixels if images else None)
