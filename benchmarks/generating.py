"""Answers of a batch as a variant of `rounds`, which itself goes without jax."""

from collections.abc import Iterator

import jax
from rounds import Run

from moresjax.core.layout import Batch
from moresjax.generation.engine import Engine


def generating(engine: Engine, batch: Batch, new_tokens: int) -> Run:
    """Prefill and the decoding of all but the first new token: phases `prefill` and `decode`."""

    def run() -> Iterator[str]:
        state = jax.block_until_ready(engine.prefill(batch, new_tokens))
        yield "prefill"
        jax.block_until_ready(engine.decode(state))
        yield "decode"

    return run
