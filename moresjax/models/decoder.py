"""Decoder LLM: LLaMA/Vicuna and Phi from one configuration.

Axis legend: B batch, S tokens, T keys, D hidden size, V vocabulary, L layers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.models.block import (
    Block,
    BlockConfig,
    BlocksOutput,
    LayerCache,
    run_blocks,
)
from moresjax.models.layers import Embedding, Linear, Norm, rope_table, stack, unstack
from moresjax.tuning.hooks import TowerHooks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """A decoder-only LLM. The defaults are LLaMA's."""

    vocab_size: int
    rope_theta: float = 10_000.0
    rotary_fraction: float = 1.0  # share of each head's features that is rotated
    tie_embeddings: bool = False
    head_bias: bool = False
    max_positions: int = 2048


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and vocabulary head."""

    def __init__(self, config: DecoderConfig):
        d, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embed = Embedding(vocab, d)
        self.blocks = stack(Block(config), config.num_layers)
        self.norm = Norm(d, kind=config.norm, eps=config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(d, vocab, axes=("embed", "vocab"), bias=config.head_bias)
        )

    def __call__(
        self,
        h: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S T"],
        hooks: TowerHooks | None = None,
        *,
        caches: list[LayerCache] | None = None,
        index: Int[Array, ""] | int | None = None,
        keep_cache: bool = False,
    ) -> BlocksOutput:
        """Runs the blocks and the final norm.

        Args:
          h: input embeddings.
          positions: rotary positions, below T.
          mask: True where a query sees a key.
          hooks: attached methods and probes.
          caches: per layer keys and values of earlier tokens, with room for these; needs `unstack`.
          index: where in the caches the new keys and values go.
          keep_cache: whether to return keys and values.
        """
        config = self.config
        dim = int(config.head_dim * config.rotary_fraction)
        rope = rope_table(positions, dim, config.rope_theta, mask.shape[-1])
        out = run_blocks(
            self.blocks,
            h,
            rope,
            mask,
            hooks or TowerHooks(),
            config,
            caches=caches,
            index=index,
            keep_cache=keep_cache,
        )
        return dataclasses.replace(out, hidden=self.norm(out.hidden))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits in fp32 of normalised hidden states."""
        if self.head is None:
            return (hidden @ self.embed.table[...].astype(hidden.dtype).T).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)

    def unstack(self) -> None:
        """Turns the stacked blocks into a list, as decoding needs them."""
        if not isinstance(self.blocks, nnx.List):
            self.blocks = unstack(self.blocks, self.config.num_layers)
