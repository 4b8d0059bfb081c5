"""The Q-Former: learned queries through a BERT that reads the visual features.

Axis legend: B images, V visual features, Q queries, C vision features, D decoder features, W width
of the Q-Former.

Source: BLIP-2 (Li et al., 2023), `Blip2QFormerModel` of transformers 5. Post-norm layers without
positions; the first of every `cross_every` layers also attends to the visual features. A linear
brings the queries to the width of the decoder.
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.errors import UserError
from moresjax.core.ranges import Depth, Size, check_ranges
from moresjax.models.attention import attention
from moresjax.models.layers import ACTIVATIONS, Linear, Norm, param, stack
from moresjax.models.resampler import broadcast_batch, join_heads, split_heads


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BERT-base.

    Raises:
      UserError: when sizes do not divide each other.
    """

    latents: Size = 128  # visual tokens per image
    layers: Depth = 12
    width: Size = 768
    heads: Size = 12
    mlp: Size = 3072
    cross_every: Depth = 2

    def __post_init__(self) -> None:
        check_ranges(self, "connector qformer: ")
        for whole, part in (("layers", "cross_every"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"connector qformer: {whole}={getattr(self, whole)} is not a multiple of "
                    f"{part}={getattr(self, part)}"
                )


def _norm(width: int) -> Norm:
    return Norm(width, kind="layer", eps=1e-12)


class QFormerAttention(nnx.Module):
    """Attention to the queries themselves or to features of another width; norm after residual."""

    def __init__(self, config: QFormerConfig, d_in: int) -> None:
        width = config.width
        self.heads = config.heads
        self.q = Linear(width, width, axes=("embed", "heads"), bias=True)
        self.k = Linear(d_in, width, axes=(None, "heads"), bias=True)
        self.v = Linear(d_in, width, axes=(None, "heads"), bias=True)
        self.o = Linear(width, width, axes=("heads", "embed"), bias=True)
        self.norm = _norm(width)

    def __call__(
        self, h: Float[Array, "B Q W"], seen: Float[Array, "B S _"]
    ) -> Float[Array, "B Q W"]:
        """The queries after they have read `seen`."""
        q, k, v = (split_heads(y, self.heads) for y in (self.q(h), self.k(seen), self.v(seen)))
        return self.norm(h + self.o(join_heads(attention(q, k, v, None))))


class QFormerLayer(nnx.Module):
    """Self-attention, attention to the features where `cross` says so, and an MLP."""

    def __init__(self, config: QFormerConfig, d_in: int, cross: bool) -> None:
        self.attn = QFormerAttention(config, config.width)
        self.cross = QFormerAttention(config, d_in) if cross else None
        self.up = Linear(config.width, config.mlp, axes=("embed", "mlp"), bias=True)
        self.down = Linear(config.mlp, config.width, axes=("mlp", "embed"), bias=True)
        self.norm = _norm(config.width)

    def __call__(
        self, h: Float[Array, "B Q W"], features: Float[Array, "B V C"]
    ) -> Float[Array, "B Q W"]:
        """The queries after this layer."""
        h = self.attn(h, h)
        h = h if self.cross is None else self.cross(h, features)
        return self.norm(h + self.down(ACTIVATIONS["gelu"](self.up(h))))


class QFormerGroup(nnx.Module):
    """`cross_every` layers, of which the first attends to the features: what the scan repeats."""

    def __init__(self, config: QFormerConfig, d_in: int) -> None:
        layers = [QFormerLayer(config, d_in, cross=not i) for i in range(config.cross_every)]
        self.layers = nnx.List(layers)

    def __call__(
        self, h: Float[Array, "B Q W"], features: Float[Array, "B V C"]
    ) -> Float[Array, "B Q W"]:
        """The queries after these layers."""
        for layer in self.layers:
            h = layer(h, features)
        return h


class QFormer(nnx.Module):
    """Visual features of an image to a fixed number of visual tokens."""

    def __init__(
        self, config: QFormerConfig, d_in: int, d_out: int, *, unroll: bool = False
    ) -> None:
        groups = config.layers // config.cross_every
        self.unroll = groups if unroll else 1
        self.latents = param((config.latents, config.width), (None, "embed"), std=0.02)
        self.norm = _norm(config.width)
        self.blocks = stack(QFormerGroup(config, d_in), groups)
        self.projection = Linear(config.width, d_out, axes=("embed", None), bias=True)

    def __call__(self, x: Float[Array, "B V C"]) -> Float[Array, "B Q D"]:
        """Visual features to visual tokens."""
        h = self.norm(broadcast_batch(self.latents[...], x))

        def body(h: Array, group: QFormerGroup) -> tuple[Array, None]:
            return group(h, x), None

        return self.projection(jax.lax.scan(body, h, self.blocks, unroll=self.unroll)[0])
