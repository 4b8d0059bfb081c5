"""Vision transformer: CLIP and SigLIP from one configuration.

Axis legend: B images, Y, X pixels, P patches (plus one with a class token), D hidden size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moresjax.models.block import Block, BlockConfig, run_blocks
from moresjax.models.layers import Linear, Norm, param, stack
from moresjax.tuning.hooks import TowerHooks


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """A ViT. The defaults are those shared by CLIP and SigLIP."""

    image_size: int
    patch_size: int
    class_token: bool = False  # CLIP has one
    pre_norm: bool = False  # norm before the first block (CLIP)
    patch_bias: bool = True  # SigLIP has one
    feature_layer: int = -2  # index into [embeddings, output of block 1, ...]
    select: str = "patch"  # patch (class token dropped) | cls_patch
    drop_first_token: bool = False  # drop one token even without a class token (728 of 729)
    norm: str = "layer"
    norm_eps: float = 1e-5
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def first_feature(self) -> int:
        """Index of the first token that is handed to the connector."""
        return int((self.class_token and self.select == "patch") or self.drop_first_token)

    @property
    def num_tokens(self) -> int:
        """V, the number of visual tokens per image."""
        return self.num_patches + self.class_token - self.first_feature

    @property
    def used_layers(self) -> int:
        """Blocks below the feature layer; the others are kept for export but never run."""
        negative = self.num_layers + 1 if self.feature_layer < 0 else 0
        return self.feature_layer + negative


class VisionEncoder(nnx.Module):
    """Images to visual features."""

    def __init__(self, config: VisionConfig):
        d, patch = config.hidden_size, config.patch_size
        norm = lambda: Norm(d, kind=config.norm, eps=config.norm_eps)  # noqa: E731
        self.config = config
        self.patch = Linear(patch * patch * 3, d, axes=(None, "embed"), bias=config.patch_bias)
        positions = config.num_patches + config.class_token
        self.position = param((positions, d), (None, "embed"), std=0.02)
        self.cls = param((d,), ("embed",), std=0.02) if config.class_token else None
        self.pre_norm = norm() if config.pre_norm else None
        self.blocks = stack(Block(config), config.used_layers)
        unused = config.num_layers - config.used_layers
        self.tail = stack(Block(config), unused) if unused else None
        self.post_norm = norm()

    def __call__(
        self, pixels: Float[Array, "B Y X 3"], hooks: TowerHooks | None = None
    ) -> Float[Array, "B V D"]:
        """Features of the visual tokens at the feature layer, before the final norm."""
        config = self.config
        h = self.patch(patchify(pixels, config.patch_size).astype(config.dtype))
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(h.dtype), (h.shape[0], 1, h.shape[-1]))
            h = jnp.concatenate([cls, h], axis=1)
        h = h + self.position[...].astype(h.dtype)
        if self.pre_norm is not None:
            h = self.pre_norm(h)
        used = dataclasses.replace(config, num_layers=config.used_layers)
        h = run_blocks(self.blocks, h, None, None, hooks or TowerHooks(), used).hidden
        return h[:, config.first_feature :]


def patchify(pixels: Float[Array, "B Y X 3"], patch: int) -> Float[Array, "B P K"]:
    """Cuts images into patches in raster order, each flattened as (row, column, channel).

    Pixels of an incomplete patch at the right or the bottom are left out.
    """
    b, y, x, c = pixels.shape
    y, x = y - y % patch, x - x % patch
    cut = pixels[:, :y, :x].reshape(b, y // patch, patch, x // patch, patch, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


class PatchClassifier(nnx.Module):
    """A vision encoder with one linear head that names every patch: vision pretraining.

    `classes` lists the sizes of the label sets; each patch gets one label from each set.
    """

    def __init__(self, config: VisionConfig, classes: tuple[int, ...]):
        self.classes = tuple(classes)
        self.vision = VisionEncoder(config)
        self.head = Linear(config.hidden_size, sum(classes), axes=("embed", None), bias=True)

    def __call__(self, pixels: Float[Array, "B Y X 3"]) -> list[Float[Array, "B V _"]]:
        """Logits for each label set."""
        logits = self.head(self.vision(pixels)).astype(jnp.float32)
        edges = [sum(self.classes[: i + 1]) for i in range(len(self.classes) - 1)]
        return jnp.split(logits, edges, axis=-1)


def image_batch(pixels: Float[Array, "B N Y X 3"]) -> Float[Array, "BN Y X 3"]:
    """Folds the images of each row into the batch axis."""
    return jax.lax.collapse(pixels, 0, 2)
