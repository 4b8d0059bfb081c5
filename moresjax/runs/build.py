"""From a configuration to a model with its initial weights."""

from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.models.vision import PatchClassifier, VisionConfig
from moresjax.runs.architecture import model_config, vision_config
from moresjax.runs.init_weights import load_parts
from moresjax.runs.processor import load_tokenizer, name_words
from moresjax.runs.run_config import PARTS, RunConfig
from moresjax.weights.hf import HFFolders


def build_model(
    config: RunConfig,
    *,
    root: str | Path = ".",
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
) -> nnx.Module:
    """The model of a configuration with its initial weights and fresh tuning parameters.

    Args:
      config: The run's configuration.
      root: The run's directory, from which paths with a leading dot start.
      mesh: Devices over which weights of Hugging Face folders are split as they are read.
      folders: Hugging Face folders that are open already; default: none.

    Returns:
      An `MLLM`; for objective `patch_classes` a `PatchClassifier`.

    Raises:
      UserError: when a part's source does not exist or does not fit.
    """
    if config.objective == "patch_classes":
        vision = vision_config(config.model.vision)
        if not isinstance(vision, VisionConfig):
            found = "has none" if vision is None else "is a pair"
            raise UserError(f"objective patch_classes needs one vision encoder, this {found}")
        return initialize(PatchClassifier(vision, config.model.classes), config.seed)
    model = MLLM(model_config(config), config.tuning)
    if model.tuning.selected_words:
        name_words(model.tuning, load_tokenizer(config.tokenizer, root))
    sources = {part: config.init.source(part) for part in PARTS}
    load_parts(model, sources, Path(root), mesh=mesh, folders=folders)
    return initialize(model, config.seed)
