"""The resampler: learned latents that read the visual features.

Axis legend: B images, V visual features, Q latents, C vision features, D decoder features, N heads,
H head size.

The Perceiver resampler of Flamingo (Alayrac et al., 2022) for one image, at the sizes of TinyLLaVA
Factory: features are first projected to D; in every layer the latents attend to the features and to
themselves; no linear but the projection has a bias.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.ranges import Depth, Size, check_ranges
from moresjax.models.attention import attention
from moresjax.models.layers import ACTIVATIONS, Linear, Norm, param, stack


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler."""

    latents: Size = 128  # visual tokens per image
    layers: Depth = 3
    heads: Size = 8
    head_dim: Size = 64
    expansion: Depth = 4  # MLP size over D

    def __post_init__(self) -> None:
        check_ranges(self, "connector resampler: ")


class ResamplerLayer(nnx.Module):
    """Attention from latents to features and latents, then an MLP; both with residuals."""

    def __init__(self, config: ResamplerConfig, d: int) -> None:
        inner, wide = config.heads * config.head_dim, config.expansion * d
        norm = lambda: Norm(d, kind="layer", eps=1e-5)  # noqa: E731
        self.heads = config.heads
        self.feature_norm, self.latent_norm, self.mlp_norm = norm(), norm(), norm()
        self.q = Linear(d, inner, axes=("embed", "heads"))
        self.k = Linear(d, inner, axes=("embed", "heads"))
        self.v = Linear(d, inner, axes=("embed", "heads"))
        self.o = Linear(inner, d, axes=("heads", "embed"))
        self.up = Linear(d, wide, axes=("embed", "mlp"))
        self.down = Linear(wide, d, axes=("mlp", "embed"))

    def __call__(
        self, latents: Float[Array, "B Q D"], features: Float[Array, "B V D"]
    ) -> Float[Array, "B Q D"]:
        """The latents after this layer."""
        x = self.latent_norm(latents)
        seen = jnp.concatenate([self.feature_norm(features), x], axis=1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(seen), self.v(seen)))
        y = attention(q, k, v, None)
        latents = latents + self.o(join_heads(y))
        return latents + self.down(ACTIVATIONS["gelu"](self.up(self.mlp_norm(latents))))


class Resampler(nnx.Module):
    """Visual features of an image to a fixed number of visual tokens."""

    def __init__(
        self, config: ResamplerConfig, d_in: int, d_out: int, *, unroll: bool = False
    ) -> None:
        self.unroll = config.layers if unroll else 1
        self.projection = Linear(d_in, d_out, axes=(None, "embed"), bias=True)
        self.latents = param((config.latents, d_out), (None, "embed"), std=1.0)
        self.blocks = stack(ResamplerLayer(config, d_out), config.layers)
        self.norm = Norm(d_out, kind="layer", eps=1e-5)

    def __call__(self, x: Float[Array, "B V C"]) -> Float[Array, "B Q D"]:
        """Visual features to visual tokens."""
        features = self.projection(x)
        latents = broadcast_batch(self.latents[...], features)

        def body(latents: Array, block: ResamplerLayer) -> tuple[Array, None]:
            return block(latents, features), None

        return self.norm(jax.lax.scan(body, latents, self.blocks, unroll=self.unroll)[0])


def broadcast_batch(x: Float[Array, "Q D"], like: Float[Array, "B V _"]) -> Float[Array, "B Q D"]:
    """The same queries for every image, in the dtype of the features."""
    return jnp.broadcast_to(x.astype(like.dtype), (like.shape[0], *x.shape))


def split_heads(x: Float[Array, "B S NH"], heads: int) -> Float[Array, "B N S H"]:
    """Features split into heads, which get an axis of their own."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x: Float[Array, "B N S H"]) -> Float[Array, "B S NH"]:
    """The features of all heads side by side: the inverse of `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
