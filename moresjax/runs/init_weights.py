"""Initial weights: parts of a model from earlier runs and Hugging Face folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.initialize import abstract, set_params
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionConfig
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.paths import is_workdir, locate
from moresjax.runs.run_config import PARTS, RANDOM
from moresjax.weights.hf import read_pretrained
from moresjax.weights.parts import check_same_encoder, is_vision_folder, load_vision


def load_parts(model: MLLM, sources: Mapping[str, str], root: Path, **options: Any) -> None:
    """Sets the parameters of every part whose source is not `random`.

    Args:
      model: The model, changed in place.
      sources: Source of each of `PARTS`.
      root: The run's directory, from which paths with a leading dot start.
      options: `mesh` and `allow_pickle` of `moresjax.weights.hf.read_pretrained`.

    Raises:
      UserError: when a source does not exist, or lacks or does not fit its part.
    """
    for part in PARTS:
        if sources[part] == RANDOM or getattr(model, part) is None:
            continue
        folders = sources[part].split(";")
        if len(folders) == 1:
            load_part(model, part, locate(folders[0], root), **options)
            continue
        count = len(getattr(model.vision, "encoders", ())) if part == "vision" else 1
        if len(folders) != count:
            raise UserError(f"init.{part} names {len(folders)} folders; the model needs {count}")
        for number, folder in enumerate(folders):
            load_part(model, f"{part}.encoders.{number}", locate(folder, root), **options)


def load_part(model: MLLM, part: str, source: Path, **options: Any) -> None:
    """Sets the parameters of one part from a run's directory or a Hugging Face folder.

    Args:
      model: The model, changed in place.
      part: `llm`, `vision`, `connector`, or one of two vision encoders: `vision.encoders.0`.
      source: A run's directory, or the folder of a LLaVA or of the LLM or vision encoder alone.
      options: `mesh` and `allow_pickle` of `moresjax.weights.hf.read_pretrained`.

    Raises:
      UserError: when the source does not exist, or lacks or does not fit the part.
    """
    if (source / "checkpoints").is_dir():
        found = trained_parameters(source)
    elif part.startswith("vision") and is_vision_folder(source):
        found = _vision_parameters(model, part, source, options)
    elif (source / "config.json").is_file():
        found = read_pretrained(source, part=part.split(".")[0], **options)[1]
    else:
        raise UserError(f"init.{part}: {source} is neither a workdir nor a Hugging Face folder")
    set_params(model, split_trainable_blocks(model, part, found), str(source), part)
    if missing := abstract(model, part):
        raise UserError(f"{source} holds no weights for {missing[0]}")


def split_trainable_blocks(
    model: nnx.Module, part: str, found: Mapping[str, jax.Array]
) -> Mapping[str, jax.Array]:
    """Parameters of a part as a model holds them whose last vision blocks train.

    Args:
      model: The model, which may have a stack of its own for its last vision blocks.
      part: The part that is loaded.
      found: Parameters by name, all vision blocks in one stack.
    """
    vision = getattr(model, "vision", None)
    last = getattr(getattr(vision, "config", None), "num_trainable_blocks", 0)
    if part != "vision" or not last or any(name.startswith("vision.last.") for name in found):
        return found
    split = dict(found)
    for name, x in found.items():
        if name.startswith("vision.blocks."):
            split[name] = x[:-last]
            split[name.replace("vision.blocks.", "vision.last.", 1)] = x[-last:]
    return split


def _vision_parameters(
    model: MLLM, part: str, source: Path, options: Mapping[str, Any]
) -> Mapping[str, jax.Array]:
    """Parameters of a vision encoder's folder, by their names in the model."""
    config = model.config.vision
    if isinstance(config, FusedVisionConfig) and part != "vision":
        config = config.encoders[int(part.rpartition(".")[2])]
    if not isinstance(config, VisionConfig):
        raise UserError(f"init.vision: {source} is one vision encoder; name two as FOLDER;FOLDER")
    same = {"feature_layer": config.feature_layer, "image_size": config.image_size}
    found, parameters = load_vision(source, part=part, **same, **options)
    check_same_encoder(config, found, str(source))
    return parameters


def trained_parameters(workdir: Path) -> dict[str, jax.Array]:
    """What the newest checkpoint of a run holds, by parameter name.

    Raises:
      UserError: when the folder is not a run's directory or has no checkpoint.
    """
    if not is_workdir(workdir):
        raise UserError(f"{workdir} is not a workdir: it has no config.json and checkpoints")
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        return checkpoints.restore_parameters()[1]
    finally:
        checkpoints.close()
