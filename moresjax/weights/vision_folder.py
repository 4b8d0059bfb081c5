"""Vision encoders from folders of their own."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.vision import VisionConfig
from moresjax.weights.families.base import vision_config, vision_family
from moresjax.weights.hf import HFFolder, unused_tensors, vision_mappings
from moresjax.weights.resize_pos_embed import resize_pos_embed
from moresjax.weights.tensor_mapping import ParameterReader, check_tensors

# Fields that say how an encoder is run and how its features are used, not which encoder it is.
_FREE_FIELDS = {
    "model_type",
    "feature_layer",
    "select",
    "drop_first_token",
    "pixel_mean",
    "pixel_std",
    "num_trainable_blocks",
    "dtype",
    "remat",
    "unroll",
}


def load_vision(
    folder: str | Path | HFFolder,
    *,
    part: str = "",
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    **changes: Any,
) -> tuple[VisionConfig, ParameterReader]:
    """Configuration and parameters of a folder of CLIP, SigLIP or DINOv2.

    Args:
      folder: A folder with `config.json` and safetensors, of the vision model alone or of the two
        towers.
      part: Where the encoder is in a model, such as `vision`: parameters' names start with it.
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors.
      mesh: The devices to split the parameters over.
      changes: Fields of the configuration; `feature_layer` decides which blocks are the `tail`, and
        DINOv2's positions are interpolated to another `image_size`.

    Raises:
      UserError: when the folder is not a checkpoint, or its family or variant is not supported.
    """
    if not isinstance(folder, HFFolder):
        folder = HFFolder(folder, allow_pickle=allow_pickle)
    config, hf = _vision_config(folder, changes)
    family = vision_family(hf)
    tensors = folder.encoder_tensors
    mappings = vision_mappings(config, hf, mesh)
    if (name := family.position_embedding) and config.image_size != hf["image_size"]:
        table = tensors[name][:]
        side, prefix = config.image_size // config.patch_size, int(config.class_token)
        tensors[name] = resize_pos_embed(table[0], side, prefix)[None]
    check_tensors(mappings, tensors, unused_tensors(), str(folder.path))
    if part:
        mappings = [mapping.within(part) for mapping in mappings]
    return config, ParameterReader(mappings, tensors)


def load_vision_config(folder: HFFolder, at_size: int | None = None) -> VisionConfig:
    """The configuration of a vision encoder's folder; see `load_vision`.

    Args:
      folder: The folder.
      at_size: The size of the images that the encoder will get, which changes one whose positions
        can be interpolated: DINOv2 is published for 518 pixels and used with 224.
    """
    config, hf = _vision_config(folder, {})
    if at_size and vision_family(hf).position_embedding:
        return dataclasses.replace(config, image_size=at_size)
    return config


def _vision_config(
    folder: HFFolder, changes: dict[str, Any]
) -> tuple[VisionConfig, dict[str, Any]]:
    """The encoder of a folder, and its part of `config.json`."""
    hf = folder.vision_hf
    return vision_config(hf, **changes), hf


def check_same_encoder(config: VisionConfig, found: VisionConfig, source: str) -> None:
    """Refuses weights made for another architecture, which the shapes alone may not show.

    Args:
      config: The model's encoder.
      found: The encoder of the weights.
      source: Their origin, for the message.

    Raises:
      UserError: that names the first field that differs.
    """
    for name, value in vars(found).items():
        if name not in _FREE_FIELDS and getattr(config, name) != value:
            raise UserError(
                f"{source} has {name}={value}, the model's vision encoder has "
                f"{name}={getattr(config, name)}"
            )
