"""Models from and to the formats of other tools: `moresjax import` and `moresjax export`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import check_new, new_folder
from moresjax.core.parameter_names import named_parameters
from moresjax.core.types import AnyArray
from moresjax.data.images import saved_image_size, saved_processor
from moresjax.data.processor import Processor
from moresjax.data.saved_processors import has_tokenizer, saved_template
from moresjax.inference.formats import ADAPTER_FORMATS, FORMATS, Trained, checked
from moresjax.inference.load import attach_saved, load
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import EVA
from moresjax.runs.architecture import DEFAULT_CONNECTOR
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import read_config, save_config
from moresjax.runs.paths import is_workdir
from moresjax.runs.processor import build_processor, load_tokenizer
from moresjax.runs.run_config import (
    DEFAULT_TEMPLATE,
    PARTS,
    RANDOM,
    InitConfig,
    PartsConfig,
    RunConfig,
)
from moresjax.runs.state import TrainState
from moresjax.tuning.merge import merged
from moresjax.weights.adapter import save_adapter
from moresjax.weights.export import export_hf, export_tinyllava
from moresjax.weights.families.llava_original import is_original
from moresjax.weights.generation_config import read_generation_config, save_generation_config
from moresjax.weights.hf import HFFolders
from moresjax.weights.minigpt import CONNECTOR as MINIGPT_CONNECTOR
from moresjax.weights.minigpt import IMAGE_SIZE as MINIGPT_IMAGE_SIZE
from moresjax.weights.minigpt import TEMPLATE as MINIGPT_TEMPLATE
from moresjax.weights.minigpt import read_minigpt
from moresjax.weights.peft import export_peft
from moresjax.weights.projector import read_projector
from moresjax.weights.pyreft import export_pyreft
from moresjax.weights.vision_folder import load_vision_config

# Where an import puts tokenizer and image processor.
PROCESSOR = "processor"


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    vision: str = "",
    fusion: str = "interleave",
    connector: str = "",
    projector: str | Path = "",
    drop_first_token: bool = False,
    image_processor: str | Path | None = None,
    template: str | None = None,
    quantize: str = "",
    minigpt: str | Path = "",
    keep_lora: bool = False,
    allow_pickle: bool = False,
) -> MLLM:
    """Writes a Hugging Face folder as a run's directory, from which everything here starts.

    >>> import tempfile
    >>> from moresjax.testing import talking_model
    >>> from moresjax.weights.export import export_hf
    >>> folder = export_hf(talking_model().mllm, tempfile.mkdtemp())
    >>> import_model(folder, tempfile.mkdtemp()).config.visual_tokens
    9

    Args:
      source: The folder of a LLaVA (also TinyLLaVA Factory's) or an LLM.
      out: A new or empty folder.
      vision: The folder of an encoder to put before an LLM, or two as `DIR;DIR`; the connector is
        then a fresh one. For a LLaVA as its authors publish it, that of its vision tower. The file
        of an EVA-ViT (`eva_vit_g.pth`) is an encoder too.
      fusion: How the features of two encoders are put together.
      connector: The kind of the fresh connector; default: that of `projector`, else
        `mlp2x_gelu`.
      projector: A file with the weights of the connector before an LLM, such as the
        `mm_projector.bin` of LLaVA's first stage.
      drop_first_token: Whether the connector reads all tokens of an encoder without class token but
        the first, as LLaVA Steering 3B does (728 of SigLIP's 729).
      image_processor: A folder with the image processor; default: that of `vision` or of `source`.
      template: The name of the conversation template; default: the one that `export` noted in the
        folder, else `vicuna_v1`.
      quantize: `int8` stores the LLM's blocks in eight bits.
      minigpt: The checkpoint of MiniGPT-v2 that was trained over `source`, which is LLaMA-2-chat,
        and `vision`, which is an EVA-ViT: it brings connector, LoRA, template and image size.
      keep_lora: Whether its LoRA stays the run's tuning; else it is merged into the LLM.
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors, `*.pth`, and
        a `projector` that is a pickle.

    Returns:
      The model that was written.

    Raises:
      UserError: when a folder is not what it should be; nothing is written then.
    """
    source, out = Path(source).resolve(), Path(out)
    check_new(out, "import")
    kind: str = ""
    weights: dict[str, np.ndarray] = {}
    if projector:
        kind, weights = read_projector(projector, allow_pickle=allow_pickle)
        if not vision:
            raise UserError(f"{projector} is the connector before an LLM; name its --vision too")
        if connector not in ("", kind):
            raise UserError(f"{projector} is a connector {kind}, not {connector}")
    connector = connector or kind or DEFAULT_CONNECTOR
    encoders = [str(Path(folder).resolve()) for folder in vision.split(";")] if vision else []
    folders = HFFolders(allow_pickle=allow_pickle)
    if len(encoders) == 1 and is_original(folders[source].raw):
        folders = HFFolders(allow_pickle=allow_pickle)
        folders.towers[source] = Path(encoders.pop())
    images = Path(image_processor or (encoders[0] if encoders else folders[source].image_folder))
    size = saved_image_size(images) if encoders else None
    if minigpt:
        _check_minigpt(folders, encoders)
        connector, template = MINIGPT_CONNECTOR, template or MINIGPT_TEMPLATE
        size = size or MINIGPT_IMAGE_SIZE
    architecture = _architecture(
        folders, source, encoders, fusion, connector, drop_first_token, size
    )
    parts = PartsConfig(llm=dataclasses.asdict(architecture.llm))
    if architecture.vision is not None:
        fields = dataclasses.asdict(architecture.vision)
        parts = dataclasses.replace(parts, vision=fields, connector=architecture.connector)
    sources = dict.fromkeys(PARTS, str(source))
    if encoders:
        sources |= {"vision": ";".join(encoders), "connector": RANDOM}
    config = RunConfig(
        name=source.name,
        model=parts,
        template=template or saved_template(source) or DEFAULT_TEMPLATE,
        quantize=quantize,
        # TinyLLaVA Factory notes how images are made square; other formats do not.
        image_aspect=folders[source].raw.get("image_aspect_ratio", "square"),
        init=InitConfig(**sources),
    )
    model = build_model(config, folders=folders)
    assert isinstance(model, MLLM)
    set_params(model, weights, str(projector))
    attach_saved(model, source, allow_pickle=allow_pickle)
    if minigpt:
        model = read_minigpt(model, minigpt, keep_lora=keep_lora, allow_pickle=allow_pickle)
    if any(method.constant for _, method in model.tuning.methods):
        raise UserError(f"{source} has a given vector beside its weights, which no run holds")
    config = dataclasses.replace(config, tuning=model.tuning.spec)

    with new_folder(out, "import") as new:
        saved = _save_processor(source, images, new / PROCESSOR, has_images=bool(parts.vision))
        # All is in the checkpoint now.
        config = dataclasses.replace(config, init=InitConfig(), **saved)
        save_config(config, new / "config.json")
        if config.tokenizer:
            build_processor(config, root=new)  # whatever is wrong with it shows now
        checkpoints = Checkpoints(new / "checkpoints")
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), nnx.state(model, nnx.Param), ()), {})
        checkpoints.close()
    return model


def _check_minigpt(folders: HFFolders, encoders: Sequence[str]) -> None:
    """Refuses a checkpoint of MiniGPT-v2 without the encoder that it belongs to."""
    if len(encoders) != 1 or folders[encoders[0]].vision_hf["model_type"] != EVA:
        raise UserError("--minigpt belongs to one EVA-ViT; give its file, --vision eva_vit_g.pth")


def _architecture(
    folders: HFFolders,
    source: Path,
    encoders: Sequence[str],
    fusion: str,
    connector: str,
    drop_first_token: bool,
    size: int | None,
) -> MLLMConfig:
    """The model of a folder, or of an LLM's folder with encoders put before it.

    Encoders that take images of any size take those of `size`, which the image processor makes.
    """
    config = folders[source].config
    if drop_first_token and len(encoders) != 1:
        raise UserError("--drop-first-token is for an LLM with --vision DIR, one encoder")
    if not encoders:
        return config
    if config.vision is not None:
        raise UserError(f"{source} has a vision encoder already; --vision is for an LLM")
    configs = [load_vision_config(folders[encoder], at_size=size) for encoder in encoders]
    if drop_first_token:
        if configs[0].class_token:
            raise UserError(f"{encoders[0]} has a class token, which is dropped already")
        configs = [dataclasses.replace(configs[0], drop_first_token=True)]
    vision: AnyVisionConfig = configs[0]
    if len(configs) > 1:
        # A pair looks at one image: the second encoder takes the first one's size.
        size = configs[0].image_size
        configs[1:] = [dataclasses.replace(other, image_size=size) for other in configs[1:]]
        vision = FusedVisionConfig(encoders=tuple(configs), fusion=fusion)
    return MLLMConfig(llm=config.llm, vision=vision, connector=connector)


def _save_processor(source: Path, images: Path, out: Path, *, has_images: bool) -> dict[str, str]:
    """Saves the tokenizer and image processor that there are.

    Returns:
      The keys of the run's configuration that name them.
    """
    found = {}
    if has_tokenizer(source):
        load_tokenizer(str(source)).save_pretrained(out)
        save_generation_config(out, read_generation_config(source))
        found["tokenizer"] = f"./{out.name}"
    if has_images and (reference := saved_processor(images)):
        reference.save_pretrained(out)
        found["image_processor"] = f"./{out.name}"
    return found


def export_model(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    adapter: str | Path | None = None,
    edits: str = "",
    allow_pickle: bool = False,
) -> Path:
    """Writes a model, or what was trained of it, in another tool's format.

    >>> import tempfile
    >>> from moresjax.testing import talking_model
    >>> from moresjax.weights.export import export_hf
    >>> base = export_hf(talking_model().mllm, tempfile.mkdtemp())
    >>> sorted(path.name for path in export_model(base, tempfile.mkdtemp(), "hf").iterdir())
    ['config.json', 'model.safetensors']

    Args:
      model: A run's directory or a Hugging Face folder.
      out: A new or empty folder.
      format: `hf`, a folder of `transformers` with the weights, and with edits beside them (see
        `moresjax.weights.edits`); `merged`, the same with weight deltas folded in; `tinyllava`, a
        whole model of TinyLLaVA Factory, also with deltas folded in; `adapter`, our own folder of
        what trained; `peft` and `pyreft`, folders of these libraries.
      adapter: A folder of one of these three formats to attach first.
      edits: What an `adapter` of pyreft does not say; see `Model.load_adapter`.
      allow_pickle: Whether pickles may be read, of the model and of an `adapter` of pyreft.

    Raises:
      UserError: when the format cannot hold the model; nothing is written then.
    """
    if format not in FORMATS:
        raise choice_error("export format", format, FORMATS)
    check_new(Path(out), "export")
    # Whole weights go out; what was trained beside them goes out over any.
    quantize = None if format in ADAPTER_FORMATS else ""
    run = read_config(Path(model) / "config.json") if is_workdir(Path(model)) else RunConfig()
    # Its own template also where that drops questions: nothing is asked here.
    template = run.template if run.tokenizer else None
    loaded = load(model, template=template, quantize=quantize, allow_pickle=allow_pickle)
    also = run.also_train if is_workdir(Path(model)) else ()
    if adapter is not None:
        before = {name: x.get_value() for name, x in named_parameters(loaded.mllm).items()}
        loaded.load_adapter(adapter, edits=edits, allow_pickle=allow_pickle)
        also = (*also, *_brought(before, loaded.mllm))
    return export_loaded(loaded.mllm, out, format, loaded.processor, also_train=also)


def export_loaded(
    mllm: MLLM,
    out: str | Path,
    format: str,
    processor: Processor | None = None,
    *,
    also_train: Sequence[str] = (),
) -> Path:
    """Writes a model that is loaded; see `export_model`.

    Args:
      mllm: The model with its tuning.
      out: A new or empty folder.
      format: One of `FORMATS`.
      processor: Tokenizer and image processor, which go along with whole models.
      also_train: Patterns of parameters outside the tuning that trained.

    Raises:
      UserError: when the format cannot hold the model; nothing is written then.
    """
    if format not in FORMATS:
        raise choice_error("export format", format, FORMATS)
    trained = Trained.of(mllm, also_train)
    with checked(format, trained), new_folder(out, "export") as new:
        if format in ADAPTER_FORMATS:
            _export_adapter(trained, new, format)
        elif format == "tinyllava":
            export_tinyllava(merged(mllm), new, processor)
        else:
            export_hf(mllm if format == "hf" else merged(mllm), new, processor)
    return Path(out)


def _brought(before: Mapping[str, AnyArray], mllm: MLLM) -> list[str]:
    """Parameters of the model itself that an adapter has set."""
    now = named_parameters(mllm).items()
    changed = [name for name, x in now if before.get(name, x.get_value()) is not x.get_value()]
    rest = [name for name in changed if not name.startswith("connector.")]
    return [*(["connector"] if len(rest) < len(changed) else []), *rest]


def _export_adapter(trained: Trained, out: Path, format: str) -> None:
    connector = "connector" in trained.also_train
    if format == "pyreft":
        export_pyreft(trained.mllm, out, connector=connector)
    elif format == "adapter":
        save_adapter(trained.mllm, out, also_train=trained.also_train)
    else:
        export_peft(trained.mllm, out, also_train=trained.also_train)
