"""From a configuration, a run's directory or a Hugging Face folder to a model and its processor."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError, choice_error
from moresjax.data.images import ImageProcessor
from moresjax.data.pipeline import Batches, make_iterator
from moresjax.data.processor import Processor, word_ids
from moresjax.data.sources import Source, make_source
from moresjax.data.subset import train_val_split
from moresjax.data.templates import get_template
from moresjax.models.connector import connector_tokens
from moresjax.models.decoder import DecoderConfig, quantized
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.initialize import abstract_params, initialize, set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import PatchClassifier, VisionConfig
from moresjax.models.zoo import ENCODERS, LLMS
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import RANDOM, read_config
from moresjax.tuning.attach import Tuning
from moresjax.weights.hf import pretrained_config, read_pretrained
from moresjax.weights.parts import check_same_encoder, is_vision_folder, load_vision

PARTS = ("llm", "vision", "connector")


def model_config(config) -> MLLMConfig:
    """The architecture that a run's configuration names.

    Raises:
      UserError: for an unknown name or field.
    """
    llm = quantized(_part("LLM", config.model.llm, LLMS, DecoderConfig), config.quantize)
    vision = _vision(config.model.vision) if config.model.vision else None
    how = {"dtype": config.dtype} if config.dtype else {}
    how |= {"remat": True} if config.remat else {}
    llm = dataclasses.replace(llm, **how, attention=config.attention)
    vision = _run_as(vision, how)
    if last := last_vision_layers(config.also_train):
        if vision is None or vision.is_pair:
            raise UserError(f"also_train vision:last{last} needs one vision encoder")
        vision = dataclasses.replace(vision, num_trainable_blocks=last)
    return MLLMConfig(llm=llm, vision=vision, connector=config.model.connector)


def last_vision_layers(also_train: Sequence[str]) -> int:
    """N of `vision:lastN`, 0 without it."""
    found = [m for pattern in also_train if (m := re.fullmatch(r"vision:last(\d+)", pattern))]
    return int(found[0][1]) if found else 0


def _run_as(vision: AnyVisionConfig | None, how: dict) -> AnyVisionConfig | None:
    if vision is None:
        return None
    if vision.is_pair:
        encoders = tuple(dataclasses.replace(encoder, **how) for encoder in vision.encoders)
        return dataclasses.replace(vision, encoders=encoders)
    return dataclasses.replace(vision, **how)


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


def build_processor(config, *, root: str | Path = ".") -> Processor:
    """Tokenizer, template and image processor of a configuration.

    Args:
      config: a run's configuration.
      root: the run's directory, see `locate`.

    Raises:
      UserError: for an unknown template, or a folder without tokenizer or image processor.
    """
    vision = _vision(config.model.vision) if config.model.vision else None
    tokens = connector_tokens(config.model.connector, vision.num_tokens) if vision else 0
    tokenizer = load_tokenizer(config.tokenizer, root)
    return Processor(
        tokenizer=tokenizer,
        template=get_template(config.template, tokenizer),
        image=_image_processor(config, vision, Path(root)) if vision else None,
        visual_tokens=tokens,
    )


def _image_processor(config, vision: AnyVisionConfig, root: Path) -> ImageProcessor:
    size, aspect = vision.image_size, config.image_aspect
    if not config.image_processor:
        return ImageProcessor(size, vision.pixel_mean, vision.pixel_std, aspect)
    return ImageProcessor.from_pretrained(locate(config.image_processor, root), size, aspect)


def build_sources(config) -> tuple[Source, Source | None]:
    """Training samples of a configuration, and validation samples if it has any.

    Raises:
      UserError: for an unknown source or option, or a share that cannot be held out.
    """
    source = make_source(**config.data)
    if config.validation.share:
        return train_val_split(source, config.validation.share, config.seed)
    return source, make_source(**config.validation.data) if config.validation.data else None


def build_iterator(config, processor: Processor, source: Source | None = None) -> Batches:
    """The batches of a configuration: an endless iterator over this process's share.

    Args:
      config: a run's configuration.
      processor: of its model.
      source: the training samples; default: all that `config.data` names.
    """
    return make_iterator(
        source or make_source(**config.data),
        processor,
        batch_size=config.batch_size,
        max_seq_len=config.max_seq_len,
        images_per_row=config.images_per_row,
        seed=config.seed,
        num_workers=config.num_workers,
        batching=config.batching,
        pack_window=config.pack_window,
        buckets=config.buckets,
        on_bad_sample=config.on_bad_sample,
    )


def load_tokenizer(name: str, root: str | Path = "."):
    """The tokenizer of the built-in digits world, or one from a folder (see `locate`).

    Raises:
      UserError: when the folder has no tokenizer.
    """
    if name == "digits":
        from moresjax.data.digits import build_tokenizer

        return build_tokenizer()
    from transformers import AutoTokenizer

    folder = locate(name, root)
    if not name or not folder.is_dir():
        raise UserError(f"tokenizer {name!r} is neither 'digits' nor a folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} has no tokenizer that can be used: {reason}") from None


def name_words(tuning: Tuning, tokenizer) -> None:
    """Tells a tuning the token ids of the words that its selectors name.

    Raises:
      UserError: for a word that is no token.
    """
    tuning.words = tuple((word, word_ids(tokenizer, word)) for word in tuning.selected_words)


def locate(name: str, root: str | Path) -> Path:
    """The folder that a configuration names.

    What starts with a dot (`../llm`) starts from `root`, the run's directory, so that runs may move
    together; everything else from where the command runs.
    """
    return (Path(root) / name if name.startswith(".") else Path(name)).resolve()


def located(config):
    """The configuration with folders that can be found from anywhere: paths that start from where
    the command runs are made absolute."""
    config = copy.deepcopy(config)

    def absolute(name: str) -> str:
        kept = not name or name in (RANDOM, "digits") or name.startswith(".")
        return name if kept else ";".join(str(Path(part).resolve()) for part in name.split(";"))

    for part in PARTS:
        config.init[part] = absolute(config.init[part])
    config.tokenizer = absolute(config.tokenizer)
    config.image_processor = absolute(config.image_processor)
    return config


def build_model(
    config, *, root: str | Path = ".", mesh: Mesh | None = None, allow_pickle: bool = False
) -> nnx.Module:
    """The model of a configuration with its initial weights and fresh tuning parameters.

    Args:
      config: a run's configuration.
      root: the run's directory, see `locate`.
      mesh: devices over which weights of Hugging Face folders are split as they are read.
      allow_pickle: whether `*.bin` files may be read where there are no safetensors.

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
        name_words(model.tuning, load_tokenizer(config.tokenizer, root))
    load_parts(model, config.init.to_dict(), Path(root), mesh=mesh, allow_pickle=allow_pickle)
    return initialize(model, config.seed)


def load_parts(model: MLLM, sources: Mapping[str, str], root: Path, **options) -> None:
    """Fills the parts whose source is not `random`; `options` are those of `load_part`.

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


def load_part(model: nnx.Module, part: str, source: Path, **options) -> None:
    """Fills one part of a model from a run's directory or a Hugging Face folder.

    Args:
      model: filled in place.
      part: `llm`, `vision`, `connector`, or one of two vision encoders: `vision.encoders.0`.
      source: a run's directory, or the folder of a LLaVA or of the LLM or vision encoder alone.
      options: `mesh` and `allow_pickle`, as in `read_pretrained`.

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
    if missing := abstract_params(model, part):
        raise UserError(f"{source} holds no weights for {missing[0]}")


def split_trainable_blocks(model: nnx.Module, part: str, found: Mapping) -> Mapping:
    """Parameters by name that have all vision blocks in one stack, for a model that keeps the last
    ones apart."""
    last = getattr(getattr(model.vision, "config", None), "num_trainable_blocks", 0)
    if part != "vision" or not last or any(name.startswith("vision.last.") for name in found):
        return found
    split = dict(found)
    for name, x in found.items():
        if name.startswith("vision.blocks."):
            split[name] = x[:-last]
            split[name.replace("vision.blocks.", "vision.last.", 1)] = x[-last:]
    return split


def _vision_parameters(
    model: nnx.Module, part: str, source: Path, options: dict
) -> Mapping[str, jax.Array]:
    """Parameters of a vision encoder's folder, by their names in the model."""
    encoder = model.vision
    if part != "vision":
        encoder = encoder.encoders[int(part.rpartition(".")[2])]
    if encoder.config.is_pair:
        raise UserError(f"init.vision: {source} is one vision encoder; name two as FOLDER;FOLDER")
    same = {"feature_layer": encoder.config.feature_layer, "image_size": encoder.config.image_size}
    theirs, parameters = load_vision(source, part=part, **same, **options)
    check_same_encoder(encoder.config, theirs, str(source))
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


def load_workdir(
    workdir: str | Path,
    *,
    tuning: str | None = None,
    quantize: str | None = None,
    allow_pickle: bool = False,
) -> tuple[MLLM, Processor | None]:
    """Model and processor of a run: the base parts from their sources, what trained from the newest
    checkpoint.

    Args:
      workdir: the run's directory.
      tuning: Spec that is attached, freshly initialised, instead of the run's own; `none` gives the
        base with what trained beside the tuning, such as the connector. Default: the run's own
        with its trained parameters, and the same for the same spec.
      quantize: `int8`, or empty for weights as they are stored; default: as the run had it.
      allow_pickle: Whether `*.bin` files of the base parts may be read where there are no
        safetensors.

    Raises:
      UserError: when the folder is not a run's directory, or the tuning does not fit its model.
    """
    workdir = Path(workdir)
    trained = trained_parameters(workdir)
    config = read_config(workdir / "config.json")
    if config.objective != "next_token":
        raise UserError(f"{workdir} trained {config.objective}; it is not a language model")
    if quantize is not None:
        config.quantize = quantize
    architecture = model_config(config)
    model = MLLM(architecture, config.tuning)
    if (
        tuning is not None
        and (chosen := MLLM(architecture, tuning)).tuning.spec != model.tuning.spec
    ):
        model = chosen
        trained = {name: x for name, x in trained.items() if not name.startswith("tuning.")}
    set_params(model, trained, str(workdir))
    rest = {part: config.init[part] if abstract_params(model, part) else RANDOM for part in PARTS}
    load_parts(model, rest, workdir, allow_pickle=allow_pickle)
    set_params(model, trained, str(workdir))  # what trained wins over the part it was started from
    # A model that was imported without a tokenizer has no processor.
    processor = build_processor(config, root=workdir) if config.tokenizer else None
    return initialize(model, config.seed), processor


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
