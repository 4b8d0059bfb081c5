"""Decoder LLM: LLaMA, Mistral, Qwen, Gemma, Phi, StableLM and OPT from one configuration.

Axis legend: B batch, S tokens, T keys, D hidden size, V vocabulary, L layers.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import LazyMask
from moresjax.core.ranges import AboveZero, AtLeastZero, NonNegative, Positive, Range, Share
from moresjax.core.types import AnyArray
from moresjax.models.attention import soft_cap
from moresjax.models.block import (
    Block,
    BlockConfig,
    BlocksOutput,
    LayerCache,
    run_blocks,
)
from moresjax.models.fused_attention import KERNELS, Runs
from moresjax.models.layers import (
    ROPE_SCALINGS,
    Embedding,
    Linear,
    Norm,
    Rope,
    join_layers,
    param,
    rope_frequencies,
    rope_table,
    scale_frequencies,
    split_layers,
    stack,
)
from moresjax.sharding.mesh import constrain_batch_sharding
from moresjax.tuning.hooks import TowerHooks

POSITIONS = ("rope", "learned")
IMAGE_ATTENTIONS = ("causal", "bidirectional")
QUANTIZATIONS = ("", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """A decoder-only LLM. The defaults are LLaMA's.

    Raises:
      UserError: for a kind of positions, rope scaling or attention that does not exist, or an odd
        number of rotated features.
    """

    vocab_size: Annotated[int, Range(1, limit=1 << 24)]
    positions: str = "rope"  # rope | learned
    position_offset: NonNegative = 0  # row of position 0 in the table of learned positions
    rope_theta: AboveZero = 10_000.0
    rope_scaling: str = "default"  # default | linear | llama3
    rope_factor: AboveZero = 1.0  # by which `rope_scaling` stretches the context
    rope_low_turns: AboveZero = 1.0  # llama3: frequencies with fewer turns of old shrink
    rope_high_turns: AboveZero = 4.0  # llama3: frequencies with more turns stay
    rope_original_positions: Positive = 8192
    local_rope_theta: AtLeastZero = 0.0  # theta of local layers, not scaled; 0: like the others
    rotary_fraction: Share = 1.0  # share of each head's features that is rotated
    scale_embeddings: bool = False  # multiply embeddings by the root of the hidden size
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: AtLeastZero = 0.0  # 0: none
    max_positions: Positive = 2048
    attention: str = "auto"  # auto | xla | splash | cudnn | chunked, see `models.fused_attention`
    # causal | bidirectional: whether the tokens of an image see all of that image (Gemma 3)
    image_attention: str = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in POSITIONS:
            raise choice_error("kind of positions", self.positions, POSITIONS)
        if self.rope_scaling not in ROPE_SCALINGS:
            raise choice_error("rope scaling", self.rope_scaling, ROPE_SCALINGS)
        if self.attention not in KERNELS:
            raise choice_error("attention", self.attention, KERNELS)
        if self.image_attention not in IMAGE_ATTENTIONS:
            raise choice_error("image attention", self.image_attention, IMAGE_ATTENTIONS)
        rotated = int(self.head_dim * self.rotary_fraction)
        if self.positions == "rope" and self.rotary_fraction and (rotated < 2 or rotated % 2):
            raise UserError(
                f"rotary positions turn pairs of features: {rotated} of a head's {self.head_dim} "
                "features are no pairs; change num_heads, head_dim or rotary_fraction"
            )

    def norms(self) -> tuple[str, ...]:
        """The names of the norms of a block and of the final norm."""
        return (*super().norms(), "norm")

    def rope_frequencies(self, local: bool = False) -> Float[np.ndarray, "H2"]:
        """Radians per position of every rotated pair, in local or in the other layers."""
        dim = int(self.head_dim * self.rotary_fraction)
        if local and self.local_rope_theta:
            return rope_frequencies(dim, self.local_rope_theta)
        return scale_frequencies(
            rope_frequencies(dim, self.rope_theta),
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_turns,
            self.rope_high_turns,
            self.rope_original_positions,
        )


def quantized(llm: DecoderConfig, how: str) -> DecoderConfig:
    """The LLM with its blocks' weights in eight bits (`int8`), or unchanged (empty).

    Raises:
      UserError: for another value.
    """
    if how not in QUANTIZATIONS:
        raise choice_error("quantize", how, QUANTIZATIONS)
    return dataclasses.replace(llm, int8=True) if how else llm


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and vocabulary head."""

    def __init__(self, config: DecoderConfig) -> None:
        d, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embed = Embedding(vocab, d)
        rows = config.max_positions + config.position_offset
        learned = config.positions == "learned"
        self.position = param((rows, d), (None, "embed"), std=0.02) if learned else None
        self.blocks = stack(Block(config), config.num_layers)
        self.norm = Norm(d, kind=config.norm, eps=config.norm_eps, offset=config.norm_offset)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(d, vocab, axes=("embed", "vocab"), bias=config.head_bias)
        )
        # A head that is the table of embeddings may have a bias of its own.
        own_bias = config.tie_embeddings and config.head_bias
        self.head_bias = param((vocab,), ("vocab",), fill=0.0) if own_bias else None

    def embeddings(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Word embeddings as the blocks take them, in the activations' dtype."""
        h = constrain_batch_sharding(self.embed(tokens)).astype(self.config.dtype)
        if self.config.scale_embeddings:
            h = h * jnp.asarray(self.config.hidden_size**0.5, h.dtype)
        return h

    def __call__(
        self,
        h: Float[Array, "B S D"],
        positions: Int[AnyArray, "B S"],
        mask: Bool[Array, "B S T"] | LazyMask | Runs,
        hooks: TowerHooks | None = None,
        *,
        caches: list[LayerCache] | None = None,
        index: Int[AnyArray, "..."] | int | None = None,
        keep_cache: bool = False,
        key_positions: Int[Array, "B T"] | None = None,
        queries: Int[Array, "B Q"] | None = None,
    ) -> BlocksOutput:
        """Runs the blocks and the final norm.

        Args:
          h: The input embeddings.
          positions: The positions of the tokens in their documents, below T.
          mask: True where a query sees a key, or that in a lazy form, or the runs that a fused
            kernel takes.
          hooks: The attached methods and probes.
          caches: Keys and values of earlier tokens per layer, with room for these; needs `unstack`.
          index: The column of the caches where the new keys and values go; one for all rows, or
            `[B]`.
          keep_cache: Returns keys and values.
          key_positions: The positions of the tokens in the caches; default: `positions`.
          queries: The columns of `h` whose hidden states are returned; default: all.

        Raises:
          UserError: for more keys than there are learned positions, where none are kept.
        """
        config, length = self.config, mask.shape[-1]
        if self.position is not None:
            # With caches there are places without a token; who keeps them counts the tokens.
            if length > config.max_positions and not (keep_cache or caches):
                raise UserError(
                    f"{length} tokens do not fit the model's {config.max_positions} positions"
                )
            h = h + self.position[...][positions + config.position_offset].astype(h.dtype)

        def rope(local: bool) -> Rope | None:
            if config.positions == "learned":
                return None
            return rope_table(jnp.asarray(positions), config.rope_frequencies(local), length)

        common, local = rope(False), None
        if any(config.local_layers):
            keys = positions if key_positions is None else key_positions
            if isinstance(mask, LazyMask | Runs):
                near = dataclasses.replace(mask, window=config.window)
            else:
                # Positions, not places in the row: padding may lie between a query and its keys.
                near = mask & (positions[:, :, None] - keys[:, None, :] < config.window)
            local = (rope(True) if config.local_rope_theta else common, near)
        out = run_blocks(
            self.blocks,
            h,
            common,
            mask,
            hooks or TowerHooks(),
            config,
            local=local,
            caches=caches,
            index=index,
            keep_cache=keep_cache,
            queries=queries,
        )
        return dataclasses.replace(out, hidden=self.norm(constrain_batch_sharding(out.hidden)))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits in fp32 of normalised hidden states."""
        if self.head is None:
            logits = hidden @ self.embed.table[...].astype(hidden.dtype).T
            if self.head_bias is not None:
                logits = logits + self.head_bias[...].astype(logits.dtype)
        else:
            logits = self.head(hidden)
        logits = constrain_batch_sharding(logits)
        return soft_cap(logits.astype(jnp.float32), self.config.logit_softcap)

    def unstack(self) -> None:
        """Turns the stacked blocks into a list, as decoding needs them."""
        if not isinstance(self.blocks, nnx.List):
            leaves, tree = jax.tree.flatten(self.blocks)
            del self.blocks
            self.blocks = split_layers(leaves, tree, self.config.num_layers)

    def restack(self) -> None:
        """Turns a list of blocks into a stack again, as training and the weight tables need it."""
        if isinstance(self.blocks, nnx.List):
            each, trees = zip(*map(jax.tree.flatten, self.blocks), strict=True)
            del self.blocks
            self.blocks = join_layers(each, trees[0])
