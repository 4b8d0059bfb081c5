"""From a configuration, a run's directory or a Hugging Face folder to a model and its processor."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from flax import nnx

from moresjax.data.images import ImageProcessor
from moresjax.data.pipeline import make_iterator, make_source
from moresjax.data.processor import Processor, word_ids
from moresjax.data.templates import get_template
from moresjax.errors import UserError, choice_error
from moresjax.models.connector import connector_tokens
from moresjax.models.decoder import DecoderConfig
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.initialize import described, fill, initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import PatchClassifier, VisionConfig
from moresjax.models.zoo import ENCODERS, LLMS
from moresjax.paths import path_name
from moresjax.training.checkpoint import Checkpoints
from moresjax.training.config import RANDOM, read_config
from moresjax.tuning.attach import Tuning
from moresjax.weights.hf import load_pretrained, pretrained_config
from moresjax.weights.parts import check_same_encoder, is_vision_folder, load_vision

PARTS = ("llm", "vision", "connector")


def model_config(config) -> MLLMConfig:
    """The architecture that a run's configuration names.

    Raises:
      UserError: for an unknown name or field.
    """
    llm = _part("LLM", config.model.llm, LLMS, DecoderConfig)
    vision = _vision(config.model.vision) if config.model.vision else None
    return MLLMConfig(llm=llm, vision=vision, connector=config.model.connector)


def _vision(value) -> AnyVisionConfig:
    """A vision encoder by name or fields; `encoders` (two of these) and `fusion` make a pair."""
    if isinstance(value, str) or "encoders" not in value:
        return _part("vision encoder", value, ENCODERS, VisionConfig)
    fields = {**value, "encoders": tuple(_vision(encoder) for encoder in value["encoders"])}
    return _part("vision encoder", fields, ENCODERS, FusedVisionConfig)


def _part(what: str, value, named: Mapping, kind: type):
    if isinstance(value, str):
        if value not in named:
            raise choice_error(what, value, named)
        return named[value]
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in value:
        if key not in fields:
            raise choice_error(f"field of {what}", key, fields)
    return kind(**value)


def build_processor(config) -> Processor:
    """Tokenizer, template and image processor of a configuration.

    Raises:
      UserError: for an unknown template or tokenizer folder.
    """
    vision = _vision(config.model.vision) if config.model.vision else None
    tokens = connector_tokens(config.model.connector, vision.num_tokens) if vision else 0
    normalise = (vision.pixel_mean, vision.pixel_std) if vision else ()
    return Processor(
        tokenizer=load_tokenizer(config.tokenizer),
        template=get_template(config.template),
        image=ImageProcessor(vision.image_size, *normalise) if vision else None,
        visual_tokens=tokens,
    )


def build_iterator(config, processor: Processor):
    """The batches of a configuration: an endless Grain iterator over this process's share."""
    return make_iterator(
        make_source(**config.data),
        processor,
        batch_size=config.batch_size,
        length=config.length,
        images=config.images,
        seed=config.seed,
    )


def load_tokenizer(name: str):
    """The tokenizer of the built-in digits world, or one from a folder.

    Raises:
      UserError: when the folder has no tokenizer.
    """
    if name == "digits":
        from moresjax.data.digits import build_tokenizer

        return build_tokenizer()
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        raise UserError(f"tokenizer {name!r} is neither 'digits' nor a folder")
    return AutoTokenizer.from_pretrained(name, local_files_only=True)


def name_words(tuning: Tuning, tokenizer) -> None:
    """Tells a tuning the token ids of the words that its selectors name.

    Raises:
      UserError: for a word that is no token.
    """
    tuning.words = tuple((word, word_ids(tokenizer, word)) for word in tuning.selected_words)


def build_model(config, *, root: str | Path = ".") -> nnx.Module:
    """The model of a configuration with its initial weights and fresh tuning parameters.

    Args:
      config: a run's configuration.
      root: folder that relative `init` paths start from.

    Raises:
      UserError: when a part's source does not exist or does not fit.
    """
    if config.objective == "patch_classes":
        vision = _vision(config.model.vision)
        if vision.is_pair:
            raise UserError("objective patch_classes needs one vision encoder, this is a pair")
        return initialize(PatchClassifier(vision, tuple(config.model.classes)), config.seed)
    model = MLLM(model_config(config), config.tuning)
    if model.tuning.selected_words:
        name_words(model.tuning, load_tokenizer(config.tokenizer))
    load_parts(model, config.init.to_dict(), Path(root))
    return initialize(model, config.seed)


def load_parts(model: MLLM, sources: Mapping[str, str], root: Path) -> None:
    """Fills the parts whose source is not `random`.

    Raises:
      UserError: when a source does not exist, or lacks or does not fit its part.
    """
    for part in PARTS:
        if sources[part] == RANDOM or getattr(model, part) is None:
            continue
        folders = sources[part].split(";")
        if len(folders) == 1:
            load_part(model, part, (root / folders[0]).resolve())
            continue
        count = len(getattr(model.vision, "encoders", ())) if part == "vision" else 1
        if len(folders) != count:
            raise UserError(f"init.{part} names {len(folders)} folders; the model needs {count}")
        for number, folder in enumerate(folders):
            load_part(model, f"{part}.encoders.{number}", (root / folder).resolve())


def load_part(model: nnx.Module, part: str, source: Path) -> None:
    """Fills one part of a model from a run's directory or a Hugging Face folder.

    `part` is `llm`, `vision`, `connector`, or one of two vision encoders: `vision.encoders.0`. The
    folder holds a LLaVA, or the LLM or the vision encoder alone.

    Raises:
      UserError: when the source does not exist, or lacks or does not fit the part.
    """
    if (source / "checkpoints").is_dir():
        found = trained_parameters(source)
    elif part.startswith("vision") and is_vision_folder(source):
        found = _vision_parameters(model, part, source)
    elif (source / "config.json").is_file():
        loaded = nnx.to_flat_state(nnx.state(load_pretrained(source), nnx.Param))
        found = {path_name(p): v.get_value() for p, v in loaded}
    else:
        raise UserError(f"init.{part}: {source} is neither a workdir nor a Hugging Face folder")
    fill(model, found, str(source), part)
    if missing := described(model, part):
        raise UserError(f"{source} holds no weights for {missing[0]}")


def _vision_parameters(model: nnx.Module, part: str, source: Path) -> dict[str, jax.Array]:
    """Parameters of a vision encoder's folder, by their names in the model."""
    encoder = model.vision
    if part != "vision":
        encoder = encoder.encoders[int(part.rpartition(".")[2])]
    if encoder.config.is_pair:
        raise UserError(f"init.vision: {source} is one vision encoder; name two as FOLDER;FOLDER")
    theirs, state = load_vision(source, feature_layer=encoder.config.feature_layer)
    check_same_encoder(encoder.config, theirs, str(source))
    return {f"{part}.{path_name(path)}": x for path, x in state.items()}


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


def load_workdir(workdir: str | Path) -> tuple[MLLM, Processor]:
    """Model and processor of a run: the base parts from their sources, what trained from the newest
    checkpoint.

    Raises:
      UserError: when the folder is not a run's directory.
    """
    workdir = Path(workdir)
    trained = trained_parameters(workdir)
    config = read_config(workdir / "config.json")
    if config.objective != "next_token":
        raise UserError(f"{workdir} trained {config.objective}; it is not a language model")
    model = MLLM(model_config(config), config.tuning)
    fill(model, trained, str(workdir))
    rest = {part: config.init[part] if described(model, part) else RANDOM for part in PARTS}
    load_parts(model, rest, workdir)
    fill(model, trained, str(workdir))  # what trained wins over the part it was started from
    return initialize(model, config.seed), build_processor(config)


def saved_config(folder: str | Path) -> tuple[MLLMConfig, str]:
    """Architecture and tuning spec of a run's directory or a Hugging Face folder, without weights.

    Raises:
      UserError: when the folder is neither.
    """
    folder = Path(folder)
    if is_workdir(folder):
        config = read_config(folder / "config.json")
        return model_config(config), config.tuning
    return pretrained_config(folder), "none"


def is_workdir(path: Path) -> bool:
    """Whether a folder is a run's directory rather than a Hugging Face checkpoint."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()
