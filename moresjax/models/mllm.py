"""The composition: vision encoder -> connector -> decoder, with the attached tuning.

Axis legend: B rows, N images per row, V visual tokens per image, S tokens, D hidden size.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, LazyMask, TokenLayout, visible
from moresjax.core.parameter_names import path_name
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.models.attention_mask import attention_mask
from moresjax.models.block import BlocksOutput, LayerCache, Mask
from moresjax.models.connector import (
    AnyConnector,
    Connector,
    build_connector,
    connector_tokens,
    feature_tokens,
    linear_widths,
    parse_connector,
)
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.fused_attention import Runs
from moresjax.models.fusion import AnyVisionConfig, FusedVisionEncoder, vision_module
from moresjax.models.vision import VisionEncoder, image_batch
from moresjax.sharding.mesh import constrain_batch_sharding
from moresjax.tuning.attach import Tuning, adapter_numbers
from moresjax.tuning.base import Params
from moresjax.tuning.hooks import AttachedWrite, Hooks
from moresjax.tuning.masks import extend_layout
from moresjax.tuning.probes import Probe, ProbeContext, needs_mask, reads_attention, reads_images


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLMConfig:
    """A multimodal LLM; without `vision` it is the plain LLM.

    Raises:
      UserError: for an unknown connector, or one that does not fit the other parts.
    """

    llm: DecoderConfig
    vision: AnyVisionConfig | None = None
    connector: str = "mlp2x_gelu"

    def __post_init__(self) -> None:
        kind, _ = parse_connector(self.connector)
        if self.vision is None:
            return
        connector_tokens(self.connector, self.vision.num_tokens)  # which must be a whole number
        if kind == "mof_mlp" and getattr(self.vision, "fusion", None) != "interleave":
            raise UserError("connector mof_mlp needs two vision encoders with fusion=interleave")
        widths = self.vision.num_features, self.llm.hidden_size
        if kind == "identity" and widths[0] != widths[1]:
            raise UserError(
                f"connector identity needs equal widths; the vision encoder has {widths[0]} "
                f"features, the LLM {widths[1]}"
            )

    @property
    def visual_tokens(self) -> int:
        """V, the number of visual tokens per image."""
        return connector_tokens(self.connector, self.vision.num_tokens) if self.vision else 0

    def visual_token_centres(self) -> Float[np.ndarray, "V 2"] | None:
        """The centre (x, y) of every visual token in the square image, from 0 to 1.

        NaN for a token that stands for no place. None for a connector whose learned queries read
        the whole image, and without a vision encoder.
        """
        if self.vision is None or (tokens := self.feature_tokens()) is None:
            return None
        centres = self.vision.token_centres()[np.argsort(tokens, kind="stable")]
        return centres.reshape(self.visual_tokens, -1, 2).mean(1)

    def feature_tokens(self) -> Int[np.ndarray, " F"] | None:
        """The visual token that each visual feature of an image becomes.

        None for a connector whose learned queries read them all, and without a vision encoder.
        """
        if self.vision is None:
            return None
        return feature_tokens(self.connector, self.vision.num_tokens)

    @property
    def places_visual_tokens(self) -> bool:
        """Whether visual tokens stand for places in the image."""
        return self.vision is None or self.visual_token_centres() is not None

    def connector_linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear of a connector that is a chain of linears."""
        if self.vision is None:
            return {}
        widths = linear_widths(self.connector, self.vision.num_features, self.llm.hidden_size) or []
        return {str(i): (widths[i], width) for i, width in enumerate(widths[1:])}

    def to_dict(self) -> dict:
        """The fields as nested dicts."""
        return dataclasses.asdict(self)


@pytree_dataclass
class PrefillChunk:
    """The tokens of a batch that are read when caches hold those before them (chunked prefill).

    Attributes:
      caches: Keys and values of every layer, with room for all keys of the batch.
      first: The column of the first token that is read; the same in all rows.
      count: How many tokens are read (static).
    """

    caches: list[LayerCache]
    first: Int[AnyArray, ""]
    count: int = dataclasses.field(metadata={"static": True})

    def select(self, x: Shaped[AnyArray, "B *S"]) -> Shaped[Array, "B *Q"]:
        """A field of the batch at these tokens."""
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), self.first, self.count, axis=1)


def _connected(connector: AnyConnector, features: Float[Array, "I P C"], hooks: Hooks) -> Array:
    """The connector's output; weight deltas act on the linears of one that is a chain."""
    return connector(features, hooks) if isinstance(connector, Connector) else connector(features)


class MLLM(nnx.Module):
    """`model(batch)` gives the decoder's hidden states; `model.llm.logits` turns them into logits.

    A new model holds shapes only; `moresjax.models.initialize` or a checkpoint fills in the values.
    """

    def __init__(self, config: MLLMConfig, tuning: str = "none") -> None:
        self.config = config
        vision: VisionEncoder | FusedVisionEncoder | None = None
        connector: AnyConnector | None = None
        if config.vision is not None:
            vision = vision_module(config.vision)
            widths = config.vision.num_features, config.llm.hidden_size
            connector = build_connector(config.connector, *widths, unroll=config.llm.unroll)
        self.vision, self.connector = vision, connector
        self.llm = Decoder(config.llm)
        self.tuning = Tuning(tuning, config)

    def visual_features(
        self, pixels: Float[Array, "B N Y X 3"], hooks: Hooks, batch: Batch | None = None
    ) -> Float[Array, "B R D"]:
        """Connector outputs of all images of each row, flattened to R = N * V tokens.

        Args:
          pixels: The images.
          hooks: The attached methods.
          batch: The batch that they belong to, whose rows may have connectors of their own.
        """
        assert self.vision is not None
        assert self.connector is not None
        features = constrain_batch_sharding(self.vision(image_batch(pixels), hooks.tower("vision")))
        own = self.tuning.own_connectors(batch) if batch is not None else None
        if own is None:
            features = _connected(self.connector, features, hooks)
        else:
            features = self._connected_by_row(*own, features, hooks)
        features = constrain_batch_sharding(features)
        features = features.reshape(pixels.shape[0], -1, features.shape[-1])
        return hooks.edit("connector.out", features)

    def _connected_by_row(
        self,
        params: Params,
        places: Int[Array, " I"],
        features: Float[Array, "I P C"],
        hooks: Hooks,
    ) -> Float[Array, "I V D"]:
        """The outputs of the connector that each image's adapter has."""
        assert self.connector is not None
        graphdef, state = nnx.split(self.connector)
        flat = dict(nnx.to_flat_state(state))

        def one(args: tuple) -> Float[Array, "V D"]:
            place, x, others = args
            own = {path: flat[path].replace(params[path_name(path)][place]) for path in flat}
            connector = nnx.merge(graphdef, nnx.from_flat_state(own))
            assert connector is not None
            return _connected(connector, x[None], hooks.of_row("connector.", others))[0]

        args = places, features, hooks.places("connector.")
        if jax.sharding.get_abstract_mesh().empty:
            return jax.lax.map(one, args)  # one connector in memory at a time
        return jax.vmap(lambda *args: one(args))(*args)

    def embed(
        self, batch: Batch, hooks: Hooks, chunk: PrefillChunk | None = None
    ) -> Float[Array, "B S D"]:
        """Input embeddings: word embeddings with visual features in the visual tokens' places."""
        tokens, image = jnp.asarray(batch.tokens), jnp.asarray(batch.layout.image)
        if chunk is not None:
            tokens, image = chunk.select(tokens), chunk.select(image)
        h = self.llm.embeddings(tokens)
        if batch.pixels is not None and batch.pixels.shape[1]:
            features = self.visual_features(jnp.asarray(batch.pixels), hooks, batch).astype(h.dtype)
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
        chunk: PrefillChunk | None = None,
        unfinished: bool = False,
        writes: Sequence[tuple[str, AttachedWrite]] = (),
    ) -> BlocksOutput:
        """Runs a whole batch (training, scoring, prefill).

        Args:
          batch: Tokens, layout and images.
          key: Turns dropout on, in training.
          probes: Statistics to read on the way, returned in `stats` by name.
          queries: Row indices of the tokens whose hidden states are returned, and which the probes
            read; default: all.
          keep_cache: Returns the keys and values of every layer.
          chunk: The tokens to read, which the queries are among; default: all.
          unfinished: Whether the rows are prefixes of prompts, of which more follows.
          writes: What replaces activations, with its sites.

        Returns:
          Hidden states after the final norm for the queries. Caches and statistics include what
          attached `VirtualTokens` put before the tokens of the batch.
        """
        if any(map(reads_images, probes)):
            batch = self._with_images(batch)
        num_extra, num_virtual = self.tuning.num_extra_tokens, self.tuning.num_virtual_tokens
        table = self.tuning.virtual_table()
        present = None if table is None else table[adapter_numbers(batch)]
        full = extend_layout(batch.layout, num_virtual, present)
        if self.config.llm.image_attention == "bidirectional" and batch.pixels is not None:
            full = full.replace(whole_images=True)
        rows, length = full.shape
        # The column that the blocks read first; learned keys come before it and have no query.
        start, count = num_virtual - num_extra, length - num_virtual + num_extra
        first = start if chunk is None else None
        if chunk is not None:
            start, count, num_extra = num_virtual + chunk.first, chunk.count, 0
        seen = LazyMask(full, jnp.broadcast_to(start + jnp.arange(count), (rows, count)))
        # Writes to the mask need one.
        masked = any(site == "llm.block.attn.mask" for site, _ in writes)
        gaps = present is not None
        mask: Mask = attention_mask(batch, seen, self.config.llm, first, gaps=gaps, dense=masked)
        if queries is not None:
            queries = jnp.asarray(queries) + num_virtual - start
        context = None
        if probes:
            context = self._context(batch, seen, mask, queries, probes)
        hooks = self.tuning.hooks(
            batch,
            key=key,
            probes=probes,
            context=context,
            cut=chunk and chunk.select,
            unfinished=unfinished,
            writes=writes,
        )
        tower = hooks.tower("llm")
        h = self.embed(batch, hooks, chunk)
        h = hooks.edit("llm.embed.out", tower.prepend(h))
        positions = jnp.asarray(full.position)
        if chunk is None:
            query_positions = positions[:, start:]
        else:
            own = num_virtual if present is None else present.sum(axis=1, keepdims=True)
            query_positions = chunk.select(batch.layout.position) + own
        out = self.llm(
            h,
            query_positions,
            mask,
            tower,
            caches=chunk.caches if chunk else None,
            index=start if chunk else None,
            keep_cache=keep_cache,
            key_positions=positions,
            queries=queries,
        )
        hidden = hooks.edit("llm.norm.out", out.hidden, queries)
        hidden = hidden[:, num_extra:] if queries is None else hidden
        return dataclasses.replace(out, hidden=hidden, stats=out.stats | hooks.stats)

    def _context(
        self,
        batch: Batch,
        seen: LazyMask,
        mask: Mask,
        queries: Int[Array, "B Q"] | None,
        probes: Sequence[Probe],
    ) -> ProbeContext:
        """What the probes of a pass are told."""
        kind, layout = jnp.asarray(seen.layout.kind), seen.layout
        context = ProbeContext(
            kind, None, queries, *self._images(batch), layout=layout, roi=batch.roi
        )
        if not any(map(reads_attention, probes)):
            return context
        if queries is not None:
            first = jnp.asarray(seen.queries)[:, :1]
            seen = dataclasses.replace(seen, queries=queries + first)
        if isinstance(mask, LazyMask | Runs):
            needed = seen.dense() if any(map(needs_mask, probes)) else None
            return dataclasses.replace(context, mask=needed, seen=seen)
        return dataclasses.replace(context, mask=mask if queries is None else seen.dense())

    def _with_images(self, batch: Batch) -> Batch:
        """The batch with black images that no token stands for, where it has none."""
        if batch.pixels is not None and batch.pixels.shape[1]:
            return batch
        assert self.config.vision is not None  # else there is no site that reads images
        size = self.config.vision.image_size
        pixels = jnp.zeros((len(batch.tokens), 1, size, size, 3), jnp.float32)
        return dataclasses.replace(batch, pixels=pixels)

    def _images(self, batch: Batch) -> tuple[Bool[Array, "B N"] | None, int]:
        """Which images there are in the places of a batch, and the patches of an image."""
        if batch.pixels is None or not self.config.visual_tokens:
            return None, 0
        count = (jnp.asarray(batch.layout.image).max(axis=1) + 1) // self.config.visual_tokens
        patches = getattr(self.config.vision, "num_patches", 0)
        return jnp.arange(batch.pixels.shape[1]) < count[:, None], patches

    def decode_step(
        self,
        tokens: Int[Array, "B Q"],
        step: TokenLayout,
        caches: list[LayerCache],
        keys: TokenLayout,
        index: Int[AnyArray, "..."],
        probes: Sequence[Probe] = (),
        adapter: Int[AnyArray, " B"] | None = None,
    ) -> BlocksOutput:
        """One generated token per row, or some more text after what the caches hold.

        Args:
          tokens: The tokens generated last.
          step: Their layout, `[B, Q]`.
          caches: Keys and values so far, with room at `index`.
          keys: The layout of the whole cache `[B, T]`, including these tokens at `index`.
          index: The column of the first of these tokens in the cache; one for all rows, or `[B]`.
          probes: The statistics to read.
          adapter: The number of each row's adapter (`Batch.adapter`).
        """
        queries = jnp.reshape(index, (-1, 1)) + jnp.arange(tokens.shape[1])
        queries = jnp.broadcast_to(queries, tokens.shape)
        mask = visible(keys, queries)
        context = None
        if probes:
            attended = mask if any(map(reads_attention, probes)) else None
            context = ProbeContext(jnp.asarray(keys.kind), attended, None, layout=keys)
        hooks = self.tuning.hooks(
            Batch(tokens, step, adapter=adapter), decoding=True, probes=probes, context=context
        )
        h = self.llm.embeddings(tokens)
        h = hooks.edit("llm.embed.out", h)
        out = self.llm(
            h,
            step.position,
            mask,
            hooks.tower("llm"),
            caches=caches,
            index=index,
            keep_cache=True,
            key_positions=jnp.asarray(keys.position),
        )
        hidden = hooks.edit("llm.norm.out", out.hidden)
        return dataclasses.replace(out, hidden=hidden, stats=out.stats | hooks.stats)

    def attach(self, tuning: str, *, seed: int = 0) -> None:
        """Replaces the attached tuning by a freshly initialised one.

        Raises:
          UserError: when the spec is malformed or does not fit this model.
        """
        self.tuning = Tuning(tuning, self.config)
        self.tuning.initialize(seed)
