"""Parts of a multimodal LLM from folders of their own."""

from pathlib import Path

from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.vision import VisionConfig, VisionEncoder
from moresjax.weights.files import open_tensors
from moresjax.weights.hf import read_hf_config
from moresjax.weights.positions import resize_positions
from moresjax.weights.sources import (
    ParameterReader,
    check_tensors,
    module_sources,
)
from moresjax.weights.tables import BESIDE_VISION, UNUSED
from moresjax.weights.vision import VISION_FAMILIES, vision_config, vision_table

# Families whose folders hold a text encoder too.
TWO_TOWERS = ("clip", "siglip")
# Of DINOv2, which is used at other image sizes than it was trained at.
POSITIONS = "embeddings.position_embeddings"
# In front of an encoder's names, when something stands on top of it.
_PREFIXES = ("vision_model.", "dinov2.", "dinov2_with_registers.")


def is_vision_folder(folder: Path) -> bool:
    """Whether a Hugging Face folder is a vision encoder's, alone or beside a text encoder."""
    if not (folder / "config.json").is_file():
        return False
    return read_hf_config(folder)["model_type"] in (*VISION_FAMILIES, *TWO_TOWERS)


def load_vision(
    folder: str | Path,
    *,
    part: str = "",
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    **changes,
) -> tuple[VisionConfig, ParameterReader]:
    """Configuration and parameters of a folder of CLIP, SigLIP or DINOv2.

    Args:
      folder: with `config.json` and safetensors, of the vision model alone or of the two towers.
      part: of a model that the parameters' names start with, such as `vision`.
      allow_pickle: whether `*.bin` files may be read where there are no safetensors.
      mesh: devices to split the parameters over.
      changes: fields of the configuration; `feature_layer` decides which blocks are the `tail`, and
        DINOv2's positions are interpolated to another `image_size`.

    Raises:
      UserError: when the folder is not a checkpoint, or its family or variant is not supported.
    """
    folder = Path(folder)
    hf = read_hf_config(folder)
    if hf["model_type"] in TWO_TOWERS:
        hf = hf["vision_config"]
    config = vision_config(hf, **changes)
    stored = open_tensors(folder, allow_pickle=allow_pickle)
    tensors = {_encoder_name(name): tensor for name, tensor in stored.items()}
    sources = module_sources(
        VisionEncoder(config), vision_table(hf), first=config.first_blocks, mesh=mesh
    )
    if hf["model_type"].startswith("dinov2") and config.image_size != hf["image_size"]:
        table = tensors[POSITIONS][:]
        side, prefix = config.image_size // config.patch_size, int(config.class_token)
        tensors[POSITIONS] = resize_positions(table[0], side, prefix)[None]
    check_tensors(sources, tensors, (*UNUSED, *BESIDE_VISION), str(folder))
    if part:
        sources = [source.under(part) for source in sources]
    return config, ParameterReader(sources, tensors)


def _encoder_name(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def check_same_encoder(ours: VisionConfig, theirs: VisionConfig, source: str) -> None:
    """Refuses weights made for another architecture, which the shapes alone may not show.

    Raises:
      UserError: that names the first field that differs.
    """
    # How the features are used, not what they are.
    free = (
        "feature_layer",
        "select",
        "drop_first_token",
        "pixel_mean",
        "pixel_std",
        "num_trainable_blocks",
    )
    free += ("dtype", "remat", "unroll")
    for name, value in vars(theirs).items():
        if name not in free and getattr(ours, name) != value:
            raise UserError(
                f"{source} has {name}={value}, the model's vision encoder has "
                f"{name}={getattr(ours, name)}"
            )
