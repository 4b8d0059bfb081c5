"""Models from and to the formats of other tools: `moresjax import` and `moresjax export`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from moresjax.core.errors import UserError, choice_error
from moresjax.data.images import saved_processor
from moresjax.inference.load import has_tokenizer, load
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.config import read_config, save_config
from moresjax.runs.paths import is_workdir
from moresjax.runs.processor import build_processor, load_tokenizer
from moresjax.runs.run_config import PARTS, RANDOM, InitConfig, PartsConfig, RunConfig
from moresjax.runs.state import TrainState
from moresjax.weights.adapter import save_adapter
from moresjax.weights.export import export_hf
from moresjax.weights.files import check_new
from moresjax.weights.generation_config import read_generation_config, save_generation_config
from moresjax.weights.hf import HFFolders
from moresjax.weights.peft import export_peft
from moresjax.weights.pyreft import export_pyreft
from moresjax.weights.vision_folder import load_vision_config

ADAPTER_FORMATS = ("adapter", "peft", "pyreft")
FORMATS = ("hf", "merged", *ADAPTER_FORMATS)
# Where an import puts tokenizer and image processor.
PROCESSOR = "processor"


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    vision: str = "",
    fusion: str = "interleave",
    connector: str = "mlp2x_gelu",
    image_processor: str | Path | None = None,
    template: str = "vicuna_v1",
    quantize: str = "",
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
        then a fresh one.
      fusion: How the features of two encoders are put together.
      connector: The kind of the fresh connector.
      image_processor: A folder with the image processor; default: that of `vision` or of `source`.
      template: The name of the conversation template.
      quantize: `int8` stores the LLM's blocks in eight bits.
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors.

    Returns:
      The model that was written.

    Raises:
      UserError: when a folder is not what it should be; nothing is written then.
    """
    source, out = Path(source).resolve(), Path(out)
    check_new(out, "import")
    encoders = [str(Path(folder).resolve()) for folder in vision.split(";")] if vision else []
    folders = HFFolders(allow_pickle=allow_pickle)
    architecture = _architecture(folders, source, encoders, fusion, connector)
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
        template=template,
        quantize=quantize,
        # TinyLLaVA Factory notes how images are made square; other formats do not.
        image_aspect=folders[source].raw.get("image_aspect_ratio", "square"),
        init=InitConfig(**sources),
    )
    model = build_model(config, folders=folders)
    assert isinstance(model, MLLM)

    out.mkdir(parents=True, exist_ok=True)
    images = Path(image_processor or (encoders[0] if encoders else source))
    saved = _save_processor(source, images, out / PROCESSOR, has_images=bool(parts.vision))
    config = dataclasses.replace(config, init=InitConfig(), **saved)  # all is in the checkpoint now
    save_config(config, out / "config.json")
    if config.tokenizer:
        build_processor(config, root=out)  # whatever is wrong with it shows now
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(TrainState(jnp.zeros((), jnp.int32), nnx.state(model, nnx.Param), ()), {})
    checkpoints.close()
    return model


def _architecture(
    folders: HFFolders, source: Path, encoders: Sequence[str], fusion: str, connector: str
) -> MLLMConfig:
    """The model of a folder, or of an LLM's folder with encoders put before it."""
    config = folders[source].config
    if not encoders:
        return config
    if config.vision is not None:
        raise UserError(f"{source} has a vision encoder already; --vision is for an LLM")
    configs = [load_vision_config(folders[encoder]) for encoder in encoders]
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
      format: `hf`, a folder of `transformers` with the base weights; `merged`, the same with the
        tuning folded into them; `adapter`, our own folder of what trained; `peft` and `pyreft`,
        folders of these libraries.
      adapter: A folder of one of these three formats to attach first.
      edits: What an `adapter` of pyreft does not say; see `Model.load_adapter`.
      allow_pickle: Whether the pickles of an `adapter` of pyreft may be read.

    Raises:
      UserError: when the format cannot hold the model.
    """
    if format not in FORMATS:
        raise choice_error("export format", format, FORMATS)
    out = Path(out)
    check_new(out, "export")
    # Whole weights go out; what was trained beside them goes out over any.
    loaded = load(model, quantize=None if format in ADAPTER_FORMATS else "")
    if adapter is not None:
        loaded.load_adapter(adapter, edits=edits, allow_pickle=allow_pickle)
    if format in ADAPTER_FORMATS:
        return _export_adapter(Path(model), loaded.mllm, out, format)
    if format == "merged":
        loaded = loaded.merge()
    if loaded.mllm.tuning.methods:
        hint = (
            "activations cannot be folded into weights"
            if format == "merged"
            else "use merged to fold its weight deltas into the weights"
        )
        raise UserError(f"format {format} cannot hold the tuning {loaded.tuning}; {hint}")
    return export_hf(loaded.mllm, out, loaded.processor)


def _export_adapter(source: Path, mllm: MLLM, out: Path, format: str) -> Path:
    if format == "pyreft":
        return export_pyreft(mllm, out)
    also = read_config(source / "config.json").also_train if is_workdir(source) else ()
    if format == "adapter":
        return save_adapter(mllm, out, also_train=also)
    return export_peft(mllm, out, also_train=also)
