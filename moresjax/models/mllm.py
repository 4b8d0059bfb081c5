"""The composition: vision encoder -> connector -> decoder, with the attached tuning.

Axis legend: B rows, N images per row, V visual tokens per image, S tokens, D hidden size.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moresjax.layout import Batch, TokenLayout, visible
from moresjax.models.block import BlocksOutput, LayerCache
from moresjax.models.connector import Connector
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.vision import VisionConfig, VisionEncoder, image_batch
from moresjax.tuning.attach import Tuning, extend_layout
from moresjax.tuning.base import Probe, ProbeContext
from moresjax.tuning.hooks import Hooks
from moresjax.types import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLMConfig:
    """A multimodal LLM; without `vision` it is the plain LLM."""

    llm: DecoderConfig
    vision: VisionConfig | None = None
    connector: str = "mlp2x_gelu"

    @property
    def visual_tokens(self) -> int:
        return self.vision.num_tokens if self.vision else 0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "MLLMConfig":
        vision = data.get("vision")
        return cls(
            llm=DecoderConfig(**data["llm"]),
            vision=VisionConfig(**vision) if vision else None,
            connector=data["connector"],
        )


class MLLM(nnx.Module):
    """`model(batch)` gives the decoder's hidden states; `model.llm.logits` turns them into logits.

    A new model holds shapes only; `moresjax.models.initialize` or a checkpoint fills in the values.
    """

    def __init__(self, config: MLLMConfig, tuning: str = "none"):
        self.config = config
        vision, width = config.vision, config.llm.hidden_size
        self.vision = VisionEncoder(vision) if vision else None
        self.connector = Connector(config.connector, vision.hidden_size, width) if vision else None
        self.llm = Decoder(config.llm)
        self.tuning = Tuning(tuning, config)

    def visual_features(
        self, pixels: Float[Array, "B N Y X 3"], hooks: Hooks
    ) -> Float[Array, "B R D"]:
        """Connector outputs of all images of each row, flattened to R = N * V tokens."""
        features = self.connector(self.vision(image_batch(pixels), hooks.tower("vision")))
        features = features.reshape(pixels.shape[0], -1, features.shape[-1])
        return hooks.edit("connector.out", features)

    def embed(self, batch: Batch, hooks: Hooks) -> Float[Array, "B S D"]:
        """Input embeddings: word embeddings with visual features in the visual tokens' places."""
        h = self.llm.embed(jnp.asarray(batch.tokens)).astype(self.config.llm.dtype)
        if batch.pixels is not None and batch.pixels.shape[1]:
            image = jnp.asarray(batch.layout.image)
            features = self.visual_features(jnp.asarray(batch.pixels), hooks).astype(h.dtype)
            visual = jnp.take_along_axis(features, jnp.maximum(image, 0)[:, :, None], axis=1)
            h = jnp.where((image >= 0)[:, :, None], visual, h)
        return h

    def __call__(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray | None = None,
        probes: Sequence[Probe] = (),
        queries: Int[AnyArray, "B Q"] | None = None,
        keep_cache: bool = False,
    ) -> BlocksOutput:
        """Runs a whole batch (training, scoring, prefill).

        Args:
          batch: tokens, layout and images.
          key: given in training; turns dropout on.
          probes: statistics to read on the way, returned in `stats` by name.
          queries: row indices of the tokens whose attention the probes read; default: all.
          keep_cache: whether to return the keys and values of every layer.

        Returns:
          Hidden states after the final norm for the tokens of the batch. Caches and statistics
          include the tokens that attached `Slots` put before them.
        """
        layout, slots = batch.layout, self.tuning.num_slots
        context = None
        full = extend_layout(layout, slots)
        if probes:
            queries = queries if queries is None else jnp.asarray(queries) + slots
            context = ProbeContext(jnp.asarray(full.segment), visible(full, queries), queries)
        hooks = self.tuning.hooks(batch, key=key, probes=probes, context=context)
        h = self.tuning.prepend_slots(self.embed(batch, hooks))
        h = hooks.edit("llm.embed.out", h)
        out = self.llm(
            h, jnp.asarray(full.position), visible(full), hooks.tower("llm"), keep_cache=keep_cache
        )
        return dataclasses.replace(out, hidden=out.hidden[:, slots:])

    def decode_step(
        self,
        tokens: Int[Array, "B 1"],
        step: TokenLayout,
        caches: list[LayerCache],
        keys: TokenLayout,
        index: Int[Array, ""],
        probes: Sequence[Probe] = (),
    ) -> BlocksOutput:
        """One generated token per row.

        Args:
          tokens: the tokens generated last.
          step: their layout, `[B, 1]`.
          caches: keys and values so far, with room at `index`.
          keys: layout of the whole cache `[B, T]`, including these tokens at `index`.
          index: place of these tokens in the cache.
          probes: statistics to read.
        """
        queries = jnp.broadcast_to(index, tokens.shape)
        mask = visible(keys, queries)
        context = ProbeContext(jnp.asarray(keys.segment), mask, None) if probes else None
        hooks = self.tuning.hooks(
            Batch(tokens, step), decoding=True, probes=probes, context=context
        )
        h = self.llm.embed(tokens).astype(self.config.llm.dtype)
        h = hooks.edit("llm.embed.out", h)
        return self.llm(
            h,
            step.position,
            mask,
            hooks.tower("llm"),
            caches=caches,
            index=index,
            keep_cache=True,
        )

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        Raises:
          UserError: when the spec is malformed or does not fit this model.
        """
        self.tuning = Tuning(tuning, self.config)
        self.tuning.initialize(seed)
