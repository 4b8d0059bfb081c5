"""From a configuration to a model with its initial weights."""

import logging
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.runs.architecture import new_model
from moresjax.runs.config import read_config
from moresjax.runs.init_tuning import load_tuning
from moresjax.runs.init_weights import load_parts
from moresjax.runs.paths import is_workdir, locate
from moresjax.runs.processor import load_tokenizer, name_words
from moresjax.runs.run_config import PARTS, RANDOM, RunConfig
from moresjax.runs.sources import with_sources
from moresjax.weights.hf import HFFolders

# Tunings without parameters of their own: what they trained is in the parts themselves.
BASE_ONLY = ("full", "partial", "ln")

logger = logging.getLogger(__name__)


def build_model(
    config: RunConfig,
    *,
    root: str | Path = ".",
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
    allow_pickle: bool = False,
) -> nnx.Module:
    """The model of a configuration with its initial weights and its tuning as it starts.

    Args:
      config: The run's configuration.
      root: The run's directory, from which paths with a leading dot start.
      mesh: Devices over which weights of Hugging Face folders are split as they are read.
      folders: Hugging Face folders that are open already; default: none.
      allow_pickle: Whether `*.bin` files may be read where a folder has no safetensors, and the
        pickles of a pyreft folder.

    Returns:
      An `MLLM`; for objective `patch_classes` a `PatchClassifier`, for `siglip` a
      `ContrastiveModel`.

    Raises:
      UserError: when a part's source does not exist or does not fit.
    """
    config = with_sources(config, root)
    model = new_model(config)
    if isinstance(model, MLLM) and model.tuning.selected_words:
        name_words(model.tuning, load_tokenizer(config.tokenizer, root))
    sources = {part: config.init.source(part) for part in PARTS if hasattr(model, part)}
    folders = HFFolders(allow_pickle=allow_pickle) if folders is None else folders
    load_parts(model, sources, Path(root), mesh=mesh, folders=folders)
    initialize(model, config.seed)
    if (tuning := config.init.source("tuning")) == RANDOM:
        _tell_what_is_left_out(config, Path(root))
    elif isinstance(model, MLLM):
        load_tuning(model, locate(tuning, root), allow_pickle=allow_pickle)
    if not isinstance(model, MLLM) and (tuning, config.tuning) != (RANDOM, "none"):
        raise UserError(f"objective {config.objective} has no tuning; leave it and init.tuning out")
    return model


def _tell_what_is_left_out(config: RunConfig, root: Path) -> None:
    """Warns of tunings of earlier runs that a run does not start from."""
    named = {name for part in PARTS for name in config.init.source(part).split(";")}
    for source in sorted(named - {RANDOM}):
        if not is_workdir(folder := locate(source, root)):
            continue
        spec = read_config(folder / "config.json").tuning
        if spec.partition(":")[0] not in ("none", *BASE_ONLY):
            logger.warning(
                "%s trained %s, which this run starts without; init.tuning=%s goes on with it",
                *(source, spec, source),
            )
