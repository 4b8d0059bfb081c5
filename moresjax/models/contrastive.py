"""A vision encoder and a text encoder that learn which caption belongs to which image (SigLIP).

Axis legend: B rows, S tokens, Y, X pixels, E features of an embedding.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind, visible
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.layers import Linear, param
from moresjax.models.vision import VisionConfig, VisionEncoder

# The values that SigLIP starts from (Zhai et al. 2023, section 3.2): at first nearly all pairs,
# which are negatives, cost nothing.
TEMPERATURE, BIAS = 10.0, -10.0


class ContrastiveModel(nnx.Module):
    """Embeds images and captions in one space; the encoder is pooled by the mean of its tokens.

    The text encoder is a decoder LLM, pooled by the mean of the caption's tokens, so that an LLM
    which has read text already can be used. Images are masked from it.
    """

    def __init__(self, vision: VisionConfig, llm: DecoderConfig) -> None:
        self.vision, self.llm = VisionEncoder(vision), Decoder(llm)
        features = vision.num_features
        self.vision_head = Linear(features, features, axes=("embed", None))
        self.text_head = Linear(llm.hidden_size, features, axes=("embed", None))
        self.log_temperature = param((), (), fill=math.log(TEMPERATURE))
        self.bias = param((), (), fill=BIAS)

    def __call__(self, batch: Batch) -> Float[Array, "B B"]:
        """The logit of every image (rows) with every caption (columns); one image per row."""
        if batch.pixels is None:
            raise UserError("objective siglip has met a batch without any image")
        images = self.embed_images(jnp.asarray(batch.pixels)[:, 0])
        captions = self.embed_captions(batch)
        return jnp.exp(self.log_temperature[...]) * images @ captions.T + self.bias[...]

    def embed_images(self, pixels: Float[Array, "B Y X 3"]) -> Float[Array, "B E"]:
        """Unit vectors of images."""
        return _unit(self.vision_head(self.vision(pixels).astype(jnp.float32).mean(1)))

    def embed_captions(self, batch: Batch) -> Float[Array, "B E"]:
        """Unit vectors of the answers of rows; what stands before them is read, images are not."""
        layout = batch.layout
        kind = jnp.asarray(layout.kind)
        own = jnp.eye(kind.shape[1], dtype=bool)
        mask = (visible(layout) & (kind != TokenKind.IMAGE)[:, None, :]) | own
        tokens = self.llm.embeddings(jnp.asarray(batch.tokens))
        hidden = self.llm(tokens, jnp.asarray(layout.position), mask).hidden
        chosen = caption_mask(batch)[:, :, None]
        total = jnp.where(chosen, hidden.astype(jnp.float32), 0.0).sum(1)
        return _unit(self.text_head(total / jnp.maximum(chosen.sum(1), 1)))


def caption_mask(batch: Batch) -> Bool[Array, "B S"]:
    """The tokens of captions."""
    return jnp.asarray(batch.layout.kind) == TokenKind.ANSWER


def _unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
