"""Two vision encoders that look at the same image.

Axis legend: B images, Y, X pixels, V visual tokens, C features.

`interleave` is the mixture of features (MoF) of Tong et al. (2024): the encoders' tokens take
turns, twice as many tokens. `channels` puts the features of a patch side by side, as Prismatic VLMs
does.

Images are normalised once, with the first encoder's mean and standard deviation; for every other
encoder the pixels are brought from there to that encoder's own.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moresjax.core.errors import UserError, choice_error
from moresjax.models.vision import VisionConfig, VisionEncoder
from moresjax.tuning.hooks import TowerHooks

FUSIONS = ("interleave", "channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedVisionConfig:
    """Two encoders with the same patch grid.

    Raises:
      UserError: for an unknown `fusion`, or encoders that do not fit together.
    """

    encoders: Sequence[VisionConfig]  # two
    fusion: str = "interleave"  # interleave | channels

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise choice_error("fusion of vision encoders", self.fusion, FUSIONS)
        object.__setattr__(self, "encoders", tuple(self.encoders))
        if len(self.encoders) != 2:
            raise UserError(f"fused vision encoders are two, got {len(self.encoders)}")
        same = ["image_size", "num_patches", "num_tokens"]
        same += ["hidden_size", "num_features"] if self.fusion == "interleave" else []
        for name in same:
            first, second = (getattr(encoder, name) for encoder in self.encoders)
            if first != second:
                raise UserError(f"fused vision encoders differ in {name}: {first} and {second}")

    @property
    def is_pair(self) -> bool:
        """Whether these are two encoders, whose blocks have no sites for tuning methods."""
        return True

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.encoders[0].image_size

    @property
    def pixel_mean(self) -> Sequence[float]:
        """The mean of each colour channel that the images are normalised with."""
        return self.encoders[0].pixel_mean

    @property
    def pixel_std(self) -> Sequence[float]:
        """The standard deviation of each colour channel that the images are normalised with."""
        return self.encoders[0].pixel_std

    @property
    def num_tokens(self) -> int:
        """V, the number of visual tokens per image."""
        return self.encoders[0].num_tokens * (2 if self.fusion == "interleave" else 1)

    def token_centres(self) -> Float[np.ndarray, "V 2"]:
        """The centre (x, y) of each visual token's patch, from 0 to 1; NaN for class tokens."""
        centres = self.encoders[0].token_centres()
        return np.repeat(centres, 2, axis=0) if self.fusion == "interleave" else centres

    @property
    def num_features(self) -> int:
        """C, the features of a visual token."""
        widths = [encoder.num_features for encoder in self.encoders]
        return widths[0] if self.fusion == "interleave" else sum(widths)


class FusedVisionEncoder(nnx.Module):
    """Images to the visual features of both encoders. Tuning methods have no sites in it."""

    def __init__(self, config: FusedVisionConfig) -> None:
        self.config = config
        self.encoders = nnx.List([VisionEncoder(encoder) for encoder in config.encoders])

    def __call__(
        self, pixels: Float[Array, "B Y X 3"], hooks: TowerHooks | None = None
    ) -> Float[Array, "B V C"]:
        """Features of the visual tokens; there are no hooks in these encoders."""
        features = [encoder(self.renormalised(pixels, encoder.config)) for encoder in self.encoders]
        if self.config.fusion == "channels":
            return jnp.concatenate(features, axis=-1)
        both = jnp.stack(features, axis=2)
        return both.reshape(both.shape[0], -1, both.shape[-1])

    def renormalised(
        self, pixels: Float[Array, "B Y X 3"], encoder: VisionConfig
    ) -> Float[Array, "B Y X 3"]:
        """Pixels with the normalisation of one encoder."""
        given, wanted = self.config, encoder
        if (given.pixel_mean, given.pixel_std) == (wanted.pixel_mean, wanted.pixel_std):
            return pixels
        mean, std, new_mean, new_std = (
            np.asarray(x, np.float32)
            for config in (given, wanted)
            for x in (config.pixel_mean, config.pixel_std)
        )
        return pixels * (std / new_std) + (mean - new_mean) / new_std


AnyVisionConfig = VisionConfig | FusedVisionConfig


def vision_module(config: AnyVisionConfig) -> VisionEncoder | FusedVisionEncoder:
    """The module of one vision encoder or of two."""
    if isinstance(config, FusedVisionConfig):
        return FusedVisionEncoder(config)
    return VisionEncoder(config)
