"""Tiny layouts and batches with random contents."""

import numpy as np

from moresjax.core.layout import Batch, TokenKind, TokenLayout
from moresjax.testing.models import TINY_LLM


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


def random_batch(
    layout: TokenLayout,
    vocab_size: int,
    images: int,
    side: int,
    seed: int | np.random.Generator = 0,
) -> Batch:
    """A batch of this layout with random tokens from 1 on, and so many random images per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab_size, layout.shape).astype(np.int32)
    pixels = rng.standard_normal((len(tokens), images, side, side, 3)).astype(np.float32)
    return Batch(tokens, layout, pixels if images else None)


def tiny_batch(rows: int = 2, images: int = 1, seed: int = 0, answer: int = 4) -> Batch:
    """BOS, `images` images, a question and an answer per row, right-padded; random contents."""
    pieces = [(TokenKind.SYSTEM, 2), (TokenKind.IMAGE, 9 * images), (TokenKind.QUESTION, 3)]
    layouts = []
    for row in range(rows):
        # The last row is one token shorter, so that there is padding.
        last = answer - (row == rows - 1 and rows > 1 and answer > 1)
        whole = [*pieces, (TokenKind.ANSWER, last)]
        layouts.append(row_layout(*whole, length=5 + 9 * images + answer))
    return random_batch(stack_layout(layouts), TINY_LLM["vocab_size"], images, 12, seed)
