"""Vision transformer: CLIP, SigLIP, DINOv2 and EVA from one configuration.

Axis legend: B images, Y, X pixels, P patches, T encoder tokens (class token, registers, patches), V
visual tokens (those handed to the connector), D hidden size, C features (D for each feature layer).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import FINITE, AtLeastZero, NonNegative, Range
from moresjax.models.block import Block, BlockConfig, run_blocks
from moresjax.models.layers import Linear, Norm, param, stack
from moresjax.tuning.hooks import TowerHooks

SELECTIONS = ("patch", "cls_patch")

# Mean and standard deviation of the colour channels, by who trained on them.
HALF = (0.5, 0.5, 0.5)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The family name of EVA-ViT in its own files, which `transformers` has under BLIP-2 only.
EVA = "eva_vit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """A ViT. The defaults are those of SigLIP.

    Raises:
      UserError: for an unknown `select`, images without a patch, or a feature layer that there is
        not.
    """

    image_size: Annotated[int, Range(1, limit=1 << 14)]
    patch_size: Annotated[int, Range(1, limit=1 << 14)]
    class_token: bool = False  # CLIP, DINOv2
    registers: NonNegative = 0  # learned tokens between class token and patches, without a position
    pre_norm: bool = False  # norm before the first block (CLIP)
    patch_bias: bool = True  # all but CLIP
    # Index into [embeddings, output of block 1, ...]; of several, the features stand side by side.
    feature_layer: Annotated[int | Sequence[int], FINITE] = -2
    num_trainable_blocks: NonNegative = 0  # last used blocks, in a stack of their own
    select: str = "patch"  # patch | cls_patch; registers are always dropped
    # Epsilon of the final norm where features pass it (MiniGPT-v2's EVA); 0: they are taken before.
    feature_norm_eps: AtLeastZero = 0.0
    drop_first_token: bool = False  # drop one token even without a class token (728 of 729)
    pixel_mean: Annotated[Sequence[float], FINITE] = HALF  # of the pixels (0..1), per colour
    pixel_std: Annotated[Sequence[float], Range(above=0)] = HALF  # and their standard deviation
    norm: str = "layer"
    norm_eps: AtLeastZero = 1e-5
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pixel_mean", "pixel_std"):  # lists when read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        layers = self.feature_layer
        if isinstance(layers, list | tuple):
            single = len(layers) == 1
            object.__setattr__(self, "feature_layer", layers[0] if single else tuple(layers))
        whole = all(isinstance(i, int) and abs(i + 0.5) < self.num_layers + 1 for i in self._chosen)
        if not whole or not self._chosen:
            raise UserError(
                f"feature_layer={layers} of a vision encoder with {self.num_layers} blocks must be "
                f"a number from {-self.num_layers - 1} to {self.num_layers}, or a list of them"
            )
        if self.select not in SELECTIONS:
            raise choice_error("select of a vision encoder", self.select, SELECTIONS)
        if self.patch_size > self.image_size:
            raise UserError(
                f"images of {self.image_size} pixels hold no patch of {self.patch_size} pixels; "
                "change image_size or patch_size of the vision encoder"
            )
        if not 0 <= self.num_trainable_blocks < max(self.used_layers, 1):
            raise UserError(
                f"the last {self.num_trainable_blocks} of {self.used_layers} vision blocks cannot "
                "be kept apart: at least one must be left"
            )

    def norms(self) -> tuple[str, ...]:
        """The names of the norms of a block, and of those before and after the blocks that run."""
        before = ("pre_norm",) if self.pre_norm else ()
        return (*super().norms(), *before, *(("post_norm",) if self.feature_norm_eps else ()))

    @property
    def is_pair(self) -> bool:
        """Whether these are two encoders, whose blocks have no sites for tuning methods."""
        return False

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches inside the encoder."""
        return self.class_token + self.registers

    @property
    def first_feature(self) -> int:
        """Index, among class token and patches, of the first token handed to the connector."""
        return int((self.class_token and self.select == "patch") or self.drop_first_token)

    @property
    def num_tokens(self) -> int:
        """V, the number of visual tokens per image."""
        return self.num_patches + self.class_token - self.first_feature

    def token_centres(self) -> Float[np.ndarray, "V 2"]:
        """The centre (x, y) of each visual token's patch, from 0 to 1; NaN for the class token."""
        side = self.image_size // self.patch_size
        middle = (np.arange(side) + 0.5) * self.patch_size / self.image_size
        patches = np.stack([np.tile(middle, side), np.repeat(middle, side)], axis=1)
        return np.concatenate([np.full((int(self.class_token), 2), np.nan), patches])[
            self.first_feature :
        ]

    @property
    def num_features(self) -> int:
        """C, the features of a visual token."""
        return self.hidden_size * len(self._chosen)

    @property
    def _chosen(self) -> Sequence[int]:
        layers = self.feature_layer
        return (layers,) if isinstance(layers, int) else layers

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The feature layers, counted from 0 for the embeddings, in the order of their features."""
        return tuple(i + self.num_layers + 1 if i < 0 else i for i in self._chosen)

    @property
    def used_layers(self) -> int:
        """Blocks below the last feature layer; the others are kept for export but never run."""
        return max(self.feature_layers)

    @property
    def first_blocks(self) -> dict[str, int]:
        """Layer number of the first block of `last` and of `tail`."""
        return {"last": self.used_layers - self.num_trainable_blocks, "tail": self.used_layers}


@dataclasses.dataclass(frozen=True)
class BlockOutputs:
    """The probe that keeps what every block returns."""

    name: str = "hidden"
    site: str = "out"

    @property
    def read(self) -> Callable[..., Float[Array, "B S D"]]:
        """Returns the output of a block."""
        return lambda context, h: h


class VisionEncoder(nnx.Module):
    """Images to visual features."""

    def __init__(self, config: VisionConfig) -> None:
        d, patch = config.hidden_size, config.patch_size

        def norm(eps: float = config.norm_eps) -> Norm:
            return Norm(d, kind=config.norm, eps=eps)

        self.config = config
        self.patch = Linear(patch * patch * 3, d, axes=(None, "embed"), bias=config.patch_bias)
        positions = config.num_patches + config.class_token
        self.position = param((positions, d), (None, "embed"), std=0.02)
        self.cls = param((d,), ("embed",), std=0.02) if config.class_token else None
        registers = config.registers
        self.registers = param((registers, d), (None, "embed"), std=0.02) if registers else None
        self.pre_norm = norm() if config.pre_norm else None
        last = config.num_trainable_blocks
        self.blocks = stack(Block(config), config.used_layers - last)
        self.last = stack(Block(config), last) if last else None
        unused = config.num_layers - config.used_layers
        self.tail = stack(Block(config), unused) if unused else None
        self.post_norm = norm(config.feature_norm_eps or config.norm_eps)

    def __call__(
        self, pixels: Float[Array, "B Y X 3"], hooks: TowerHooks | None = None
    ) -> Float[Array, "B V C"]:
        """Features of the visual tokens at the feature layers.

        They are taken before the final norm, or behind it with `feature_norm_eps`.

        Raises:
          UserError: for images of another size than the position embedding has.
        """
        config, hooks = self.config, hooks or TowerHooks()
        # Attention without mask or rotation does not know where in the row extra tokens stand.
        h = hooks.prepend(self.embed(pixels))
        layers = config.feature_layers
        if not config.used_layers:  # the features are the embeddings
            kept = self._visual(h[:, hooks.num_extra_tokens :])
            return jnp.concatenate([kept] * len(layers), axis=-1)
        used = dataclasses.replace(
            config, num_layers=config.used_layers, feature_layer=-1, num_trainable_blocks=0
        )
        if len(layers) == 1:
            out = run_blocks(self.used_blocks(), h, None, None, hooks, used)
            hooks.stats |= out.stats
            return self._visual(out.hidden[:, hooks.num_extra_tokens :])
        hooks.probes = (*hooks.probes, BlockOutputs())
        stats = run_blocks(self.used_blocks(), h, None, None, hooks, used).stats
        hidden = stats.pop(BlockOutputs.name)
        hooks.stats |= stats
        states = [hidden[i - 1] if i else h for i in layers]
        kept = [self._visual(state[:, hooks.num_extra_tokens :]) for state in states]
        return jnp.concatenate(kept, axis=-1)

    def _visual(self, h: Float[Array, "B T D"]) -> Float[Array, "B V D"]:
        """The features of the visual tokens among those of the encoder."""
        config = self.config
        if config.registers:
            first = int(config.class_token)
            h = jnp.concatenate([h[:, :first], h[:, config.prefix_tokens :]], axis=1)
        h = h[:, config.first_feature :]
        return self.post_norm(h) if config.feature_norm_eps else h

    def used_blocks(self) -> Block:
        """The stack of all blocks below the feature layer, in the dtype of the first of them."""
        if self.last is None:
            return self.blocks
        return jax.tree.map(
            lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), self.blocks, self.last
        )

    def embed(self, pixels: Float[Array, "B Y X 3"]) -> Float[Array, "B T D"]:
        """What the first block reads."""
        config, size = self.config, self.config.image_size
        if pixels.shape[1:3] != (size, size):
            y, x = pixels.shape[1:3]
            raise UserError(f"images have {y}x{x} pixels; the vision encoder takes {size}x{size}")
        h = self.patch(patchify(pixels, config.patch_size).astype(config.dtype))

        def before(tokens: Float[Array, "T D"], h: Float[Array, "B S D"]) -> Float[Array, "B TS D"]:
            tokens = jnp.broadcast_to(tokens.astype(h.dtype), (h.shape[0], *tokens.shape))
            return jnp.concatenate([tokens, h], axis=1)

        if self.cls is not None:
            h = before(self.cls[...][None], h)
        h = h + self.position[...].astype(h.dtype)
        if self.registers is not None:
            first = int(config.class_token)
            h = jnp.concatenate([h[:, :first], before(self.registers[...], h[:, first:])], axis=1)
        return h if self.pre_norm is None else self.pre_norm(h)


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

    def __init__(self, config: VisionConfig, classes: tuple[int, ...]) -> None:
        self.classes = tuple(classes)
        self.vision = VisionEncoder(config)
        self.head = Linear(config.num_features, sum(classes), axes=("embed", None), bias=True)

    def __call__(self, pixels: Float[Array, "B Y X 3"]) -> list[Float[Array, "B V _"]]:
        """Logits for each label set."""
        logits = self.head(self.vision(pixels)).astype(jnp.float32)
        edges = [sum(self.classes[: i + 1]) for i in range(len(self.classes) - 1)]
        return jnp.split(logits, edges, axis=-1)


def image_batch(pixels: Float[Array, "B N Y X 3"]) -> Float[Array, "BN Y X 3"]:
    """Folds the images of each row into the batch axis."""
    return jax.lax.collapse(pixels, 0, 2)
