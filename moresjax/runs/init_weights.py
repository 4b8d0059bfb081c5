"""Initial weights: parts of a model from earlier runs and Hugging Face folders."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters
from moresjax.models.fusion import FusedVisionEncoder
from moresjax.models.initialize import abstract_params, initialize, set_params
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionEncoder
from moresjax.runs.architecture import AnyModel, new_model
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import read_config
from moresjax.runs.paths import is_workdir, locate
from moresjax.runs.run_config import PARTS, RANDOM
from moresjax.runs.same_parts import PartConfig, check_same_part
from moresjax.weights.hf import HFFolder, HFFolders
from moresjax.weights.vision_folder import load_vision


@dataclasses.dataclass
class _Open:
    """What is open while the parts of a model are read.

    Attributes:
      mesh: The devices over which weights of Hugging Face folders are split as they are read.
      folders: Hugging Face folders.
      runs: What earlier runs trained, by their directory.
    """

    mesh: Mesh | None
    folders: HFFolders
    runs: dict[Path, Mapping[str, jax.Array]] = dataclasses.field(default_factory=dict)

    def trained(self, workdir: Path) -> Mapping[str, jax.Array]:
        """What the newest checkpoint of a run holds; it is read once."""
        if workdir not in self.runs:
            self.runs[workdir] = trained_parameters(workdir)
        return self.runs[workdir]


def load_parts(
    model: AnyModel,
    sources: Mapping[str, str],
    root: Path,
    *,
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
) -> None:
    """Sets the parameters of every part whose source is not `random`.

    Args:
      model: The model, changed in place.
      sources: Sources of some of `PARTS`; the others stay as they are.
      root: The run's directory, from which paths with a leading dot start.
      mesh: The devices over which weights of Hugging Face folders are split as they are read.
      folders: Hugging Face folders that are open already; default: none.

    Raises:
      UserError: when a source does not exist, or lacks or does not fit its part.
    """
    _load_parts(model, sources, root, _Open(mesh, HFFolders() if folders is None else folders))


def _load_parts(model: AnyModel, sources: Mapping[str, str], root: Path, opened: _Open) -> None:
    for part in PARTS:
        source = sources.get(part, RANDOM)
        if source == RANDOM or getattr(model, part) is None:
            continue
        names = source.split(";")
        if len(names) == 1:
            _load_part(model, part, locate(names[0], root), opened)
            continue
        count = len(getattr(model.vision, "encoders", ())) if part == "vision" else 1
        if len(names) != count:
            raise UserError(f"init.{part} names {len(names)} folders; the model needs {count}")
        for number, name in enumerate(names):
            _load_part(model, f"{part}.encoders.{number}", locate(name, root), opened)


def load_part(
    model: AnyModel,
    part: str,
    source: Path,
    *,
    mesh: Mesh | None = None,
    folders: HFFolders | None = None,
) -> None:
    """Sets the parameters of one part from a run's directory or a Hugging Face folder.

    A run gives what it trained; what it left frozen comes from its own sources.

    Args:
      model: The model, changed in place.
      part: `llm`, `vision`, `connector`, or one of two vision encoders: `vision.encoders.0`.
      source: A run's directory, or the folder of a LLaVA or of the LLM or vision encoder alone.
      mesh: The devices over which weights of a Hugging Face folder are split as they are read.
      folders: Hugging Face folders that are open already; default: none.

    Raises:
      UserError: when the source does not exist, or lacks or does not fit the part.
    """
    _load_part(model, part, source, _Open(mesh, HFFolders() if folders is None else folders))


def _load_part(model: AnyModel, part: str, source: Path, opened: _Open) -> None:
    folder = opened.folders[source]
    if (source / "checkpoints").is_dir():
        found = _run_parameters(model, part, source, opened)
    elif part.startswith("vision") and folder.is_vision:
        found = _vision_parameters(model, part, folder, opened.mesh)
    elif (source / "config.json").is_file():
        top = part.split(".")[0]
        found = folder.parameters(top, opened.mesh)
        _check_same_part(model, top, getattr(folder.config, top), source)
    else:
        raise UserError(f"init.{part}: {source} is neither a workdir nor a Hugging Face folder")
    set_params(model, split_trainable_blocks(model, part, found), str(source), part)
    if missing := abstract_params(model, part):
        raise UserError(f"{source} holds no weights for {missing[0]}")


def _run_parameters(
    model: AnyModel, part: str, workdir: Path, opened: _Open
) -> Mapping[str, jax.Array]:
    """Parameters of a part of an earlier run: what it trained, the rest from its own sources."""
    trained = opened.trained(workdir)
    config = read_config(workdir / "config.json")
    eight = isinstance(model, MLLM) and model.config.llm.int8
    run = new_model(dataclasses.replace(config, tuning="none", quantize="int8" if eight else ""))
    top = part.split(".")[0]
    if getattr(run, top, None) is None:
        raise UserError(f"init.{part}: {workdir} holds no weights for {top}: its model has none")
    _check_same_part(model, top, _architecture(run, top), workdir)
    set_params(run, trained, str(workdir), part)
    if abstract_params(run, part):
        _load_parts(run, {top: config.init.source(top)}, workdir, opened)
        set_params(run, trained, str(workdir), part)  # what trained wins
        initialize(run, config.seed, part)
    values = {name: variable.get_value() for name, variable in named_parameters(run).items()}
    found = {name: x for name, x in values.items() if name.startswith(f"{part}.")}
    return found if _num_last(run) == _num_last(model) else _join_trainable_blocks(found)


def _architecture(model: AnyModel, part: str) -> PartConfig | None:
    """What the model has as a part."""
    if part == "connector":
        return model.config.connector if isinstance(model, MLLM) else None
    return getattr(model, part).config


def _check_same_part(model: AnyModel, part: str, theirs: PartConfig | None, source: Path) -> None:
    """Refuses a part of another architecture, which shapes alone may not show."""
    if theirs is not None and (ours := _architecture(model, part)) is not None:
        check_same_part(part, ours, theirs, source, warn=True)


def _num_last(model: AnyModel) -> int:
    """How many of the last vision blocks have a stack of their own."""
    return getattr(getattr(model.vision, "config", None), "num_trainable_blocks", 0)


def _join_trainable_blocks(found: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Parameters with all vision blocks in one stack."""
    joined = {name: x for name, x in found.items() if not name.startswith("vision.last.")}
    for name in found.keys() - joined.keys():
        first = name.replace("vision.last.", "vision.blocks.", 1)
        joined[first] = jnp.concatenate([found[first], found[name]])
    return joined


def split_trainable_blocks(
    model: AnyModel, part: str, found: Mapping[str, jax.Array]
) -> Mapping[str, jax.Array]:
    """Parameters of a part as a model holds them whose last vision blocks train.

    Args:
      model: The model, which may have a stack of its own for its last vision blocks.
      part: The part that is loaded.
      found: Parameters by name, all vision blocks in one stack.
    """
    last = _num_last(model)
    if part != "vision" or not last or any(name.startswith("vision.last.") for name in found):
        return found
    split = dict(found)
    for name, x in found.items():
        if name.startswith("vision.blocks."):
            split[name] = x[:-last]
            split[name.replace("vision.blocks.", "vision.last.", 1)] = x[-last:]
    return split


def _vision_parameters(
    model: AnyModel, part: str, folder: HFFolder, mesh: Mesh | None
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
    check_same_part("vision", config, found, folder.path)
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
