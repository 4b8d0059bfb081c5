"""Initial weights: parts of a model from earlier runs and Hugging Face folders."""

from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.fusion import FusedVisionEncoder
from moresjax.models.initialize import abstract_params, set_params
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionEncoder
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.paths import is_workdir, locate
from moresjax.runs.run_config import PARTS, RANDOM
from moresjax.weights.hf import HFFolder, HFFolders
from moresjax.weights.vision_folder import check_same_encoder, load_vision


def load_parts(
    model: MLLM,
    sources: Mapping[str, str],
    root: Path,
    *,
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
) -> None:
    """Sets the parameters of every part whose source is not `random`.

    Args:
      model: The model, changed in place.
      sources: Source of each of `PARTS`.
      root: The run's directory, from which paths with a leading dot start.
      mesh: The devices over which weights of Hugging Face folders are split as they are read.
      folders: Hugging Face folders that are open already; default: none.

    Raises:
      UserError: when a source does not exist, or lacks or does not fit its part.
    """
    folders = HFFolders() if folders is None else folders
    for part in PARTS:
        if sources[part] == RANDOM or getattr(model, part) is None:
            continue
        names = sources[part].split(";")
        if len(names) == 1:
            load_part(model, part, locate(names[0], root), mesh=mesh, folders=folders)
            continue
        count = len(getattr(model.vision, "encoders", ())) if part == "vision" else 1
        if len(names) != count:
            raise UserError(f"init.{part} names {len(names)} folders; the model needs {count}")
        for number, name in enumerate(names):
            place = f"{part}.encoders.{number}"
            load_part(model, place, locate(name, root), mesh=mesh, folders=folders)


def load_part(
    model: MLLM,
    part: str,
    source: Path,
    *,
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
) -> None:
    """Sets the parameters of one part from a run's directory or a Hugging Face folder.

    Args:
      model: The model, changed in place.
      part: `llm`, `vision`, `connector`, or one of two vision encoders: `vision.encoders.0`.
      source: A run's directory, or the folder of a LLaVA or of the LLM or vision encoder alone.
      mesh: The devices over which weights of a Hugging Face folder are split as they are read.
      folders: Hugging Face folders that are open already; default: none.

    Raises:
      UserError: when the source does not exist, or lacks or does not fit the part.
    """
    folder = (HFFolders() if folders is None else folders)[source]
    if (source / "checkpoints").is_dir():
        found = trained_parameters(source)
    elif part.startswith("vision") and folder.is_vision:
        found = _vision_parameters(model, part, folder, mesh)
    elif (source / "config.json").is_file():
        found = folder.parameters(part.split(".")[0], mesh)
    else:
        raise UserError(f"init.{part}: {source} is neither a workdir nor a Hugging Face folder")
    set_params(model, split_trainable_blocks(model, part, found), str(source), part)
    if missing := abstract_params(model, part):
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
    model: MLLM, part: str, folder: HFFolder, mesh: Mesh | None
) -> Mapping[str, jax.Array]:
    """Parameters of a vision encoder's folder, by their names in the model."""
    encoder, source = model.vision, str(folder.path)
    if isinstance(encoder, FusedVisionEncoder) and part != "vision":
        encoder = encoder.encoders[int(part.rpartition(".")[2])]
    if not isinstance(encoder, VisionEncoder):
        raise UserError(f"init.vision: {source} is one vision encoder; name two as FOLDER;FOLDER")
    config = encoder.config
    found, parameters = load_vision(
        folder,
        part=part,
        mesh=mesh,
        feature_layer=config.feature_layer,
        image_size=config.image_size,
    )
    check_same_encoder(config, found, source)
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
