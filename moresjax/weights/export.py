"""Models to Hugging Face folders that `transformers` loads with equal logits."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors.numpy import save_file

from moresjax.core.errors import UserError
from moresjax.core.folders import new_folder
from moresjax.core.json_files import write_json
from moresjax.core.parameter_names import layered_parameters, path_name
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK
from moresjax.data.saved_processors import save_template
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.methods.mores import MoReS
from moresjax.weights import steering
from moresjax.weights.edits import write_edits
from moresjax.weights.families.base import MLLM_FAMILIES, MLLMFamily, hf_decoder_config
from moresjax.weights.families.gemma3 import Gemma3Images
from moresjax.weights.families.llava import Llava
from moresjax.weights.families.tinyllava import TinyLlava
from moresjax.weights.families.vipllava import VipLlava
from moresjax.weights.hf import model_mappings
from moresjax.weights.pyreft import export_pyreft
from moresjax.weights.tensor_mapping import TensorMapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"


def export_hf(
    mllm: MLLM, folder: str | Path, processor: Processor | None = None, shard_size: str = SHARD_SIZE
) -> Path:
    """Writes the weights, in the dtype they have, with configuration and processor.

    Attached edits lie beside them (see `moresjax.weights.edits`). The padding that `aspect="pad"`
    adds to images has no place in the format: whoever loads the folder elsewhere pads before the
    image processor. A LLaVA whose vocabulary has no place for `<image>`, which the format needs and
    never reads, gets one: the mean of all embeddings.

    Args:
      mllm: The model.
      folder: A new or empty folder.
      processor: Its tokenizer and image processor are saved too.
      shard_size: The size of the largest file, such as `5GB`; more weights go into several.

    Returns:
      The folder.

    Raises:
      UserError: when no architecture of `transformers` is the model's, something else than edits is
        attached, or the folder is not empty; nothing is written then.
    """
    with new_folder(folder, "export") as new:
        config, hf = mllm.config, hf_config(mllm.config)
        tokenizer: Any = None if processor is None else processor.tokenizer
        if config.vision is not None:
            mark = _family(config).image_mark
            tokenizer, image_token = with_image_token(tokenizer, config, mark)
            config = _with_rows(config, image_token + 1)
            hf = hf_config(config) | {"image_token_index": image_token}
        _write_model(mllm, config, hf, new, shard_size)
        if processor is not None and tokenizer is not None:
            _write_processor(processor, tokenizer, config, hf, new)
            save_template(processor.template, new)
        if any(key in mllm.tuning.params for key, _ in mllm.tuning.methods):
            system_ids = () if processor is None else processor.system_ids
            write_edits(mllm, new, hf, system_ids=system_ids)
    return Path(folder)


def export_tinyllava(
    mllm: MLLM, folder: str | Path, processor: Processor | None = None, shard_size: str = SHARD_SIZE
) -> Path:
    """Writes the weights as a whole model of TinyLLaVA Factory.

    An attached `mores` lies beside them as LLaVA Steering saves it.

    Args:
      mllm: The model.
      folder: A new or empty folder.
      processor: Its tokenizer and image processor are saved too.
      shard_size: The size of the largest file, such as `5GB`; more weights go into several.

    Returns:
      The folder.

    Raises:
      UserError: when the factory has no such model, something else is attached, or the folder is
        not empty; nothing is written then.
    """
    tuning = mllm.tuning
    methods = [method for key, method in tuning.methods if key in tuning.params]
    if wrong := [what for method in methods if (what := steering.unnoted(method))]:
        raise UserError(f"a folder of TinyLLaVA Factory has no place for {wrong[0]}")
    if len(methods) > 1:
        raise UserError("a folder of TinyLLaVA Factory has a place for one mores")
    with new_folder(folder, "export") as new:
        hf = tinyllava_config(mllm.config)
        if processor is not None and processor.image is not None:
            hf["image_aspect_ratio"] = processor.image.aspect
        _write_model(mllm, mllm.config, hf, new, shard_size)
        if processor is not None:
            _write_generation(processor, processor.tokenizer, new)
            save_template(processor.template, new)
            processor.tokenizer.save_pretrained(new)
            if processor.image is not None:
                _image_processor(processor.image).save_pretrained(new)
        for method in methods:
            assert isinstance(method, MoReS)
            place = export_pyreft(mllm, new / steering.PLACE, kind=steering.MORES)
            layers = len(list(place.glob("intkey_*.bin")))
            config = mllm.config
            steering.note(method, layers, config.llm.hidden_size, config.visual_tokens, place)
    return Path(folder)


def hf_config(config: MLLMConfig) -> dict[str, Any]:
    """The whole `config.json` of the model of `transformers` that computes the same.

    Raises:
      UserError: when there is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _as_stored(config)
    if config.vision is not None:
        family = _family(config)
        return family.to_hf(config) | {"architectures": [family.architecture]}
    hf = hf_decoder_config(config.llm)
    return hf | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf["model_type"]]]}


def _family(config: MLLMConfig) -> MLLMFamily:
    """The family whose models are wired as this one is, if any is."""
    if config.llm.image_attention == "bidirectional":
        return Gemma3Images()
    return VipLlava() if config.connector.startswith(VipLlava.before) else Llava()


def tinyllava_config(config: MLLMConfig) -> dict[str, Any]:
    """The whole `config.json` of the model of TinyLLaVA Factory that computes the same.

    Raises:
      UserError: when there is none.
    """
    return TinyLlava().to_hf(_as_stored(config))


def _as_stored(config: MLLMConfig) -> MLLMConfig:
    """The architecture without what says how it is run."""
    run = {"dtype": "float32", "remat": False, "unroll": False}
    llm, vision = dataclasses.replace(config.llm, **run, attention="auto"), config.vision
    if isinstance(vision, VisionConfig):
        vision = dataclasses.replace(vision, **run)
    return dataclasses.replace(config, llm=llm, vision=vision)


def _with_rows(config: MLLMConfig, rows: int) -> MLLMConfig:
    """The architecture with a vocabulary of so many tokens, at least."""
    if rows <= config.llm.vocab_size:
        return config
    logger.warning(
        "the LLM has %d embeddings and none for %s: the folder gets %d, new ones being the mean",
        *(config.llm.vocab_size, IMAGE_MARK, rows),
    )
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=rows))


def _write_model(
    mllm: MLLM, config: MLLMConfig, hf: dict[str, Any], folder: Path, shard_size: str
) -> None:
    """Writes `config.json` and the weights, whose vocabulary may grow to that of `config`."""
    hf["dtype"] = str(mllm.llm.embed.table[...].dtype)
    family = MLLM_FAMILIES.get(hf["model_type"])
    name = family.written_name if family else str
    _write_tensors(mllm, model_mappings(config, hf), folder, shard_size, name)
    write_json(folder / "config.json", hf, default=str)


def _write_tensors(
    mllm: MLLM,
    mappings: list[TensorMapping],
    folder: Path,
    shard_size: str,
    written_name: Callable[[str], str],
) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    values = layered_parameters(mllm)
    owners = {written_name(name): mapping for mapping in mappings for name in mapping.names}
    sizes = {
        name: jax.ShapeDtypeStruct(mapping.tensor_shape, values[path_name(mapping.path)][0].dtype)
        for name, mapping in owners.items()
    }
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda x: int(np.prod(x.shape)) * x.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in shards.filename_to_tensors.items():
        needed = {path_name(owners[name].path): owners[name] for name in names}
        tensors = {}
        for path, mapping in needed.items():
            # One array per layer where the model has generated and holds its blocks one by one.
            layers = [np.asarray(variable.get_value()) for variable in values[path]]
            stacked = layers[0].ndim == len(mapping.shape)
            whole = layers[0] if stacked else np.stack(layers)
            made = mapping.to_hf(_grown(whole, mapping.shape))
            tensors |= {written_name(name): tensor for name, tensor in made.items()}
        tensors = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _grown(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A table, head or bias of a vocabulary of another size; the new tokens are the mean of all.

    So their logits are never the highest, and the softmax of the others changes by less than one
    part in as many as there are tokens.
    """
    changed = [i for i, (old, new) in enumerate(zip(x.shape, shape, strict=True)) if old != new]
    if not changed:
        return x
    [axis] = changed
    mean = np.asarray(x, np.float32).mean(axis, keepdims=True).astype(x.dtype)
    return np.concatenate([x, np.repeat(mean, shape[axis] - x.shape[axis], axis)], axis)


def with_image_token(
    tokenizer: "PreTrainedTokenizerBase | None", config: MLLMConfig, mark: str = IMAGE_MARK
) -> "tuple[PreTrainedTokenizerBase | None, int]":
    """The tokenizer, with a token that stands for a visual token, and that token's id.

    Without a tokenizer it is the last id. A token that is new comes after the tokenizer's others,
    even where the model has no embedding for it.
    """
    if tokenizer is None:
        return None, config.llm.vocab_size - 1
    if mark not in tokenizer.get_vocab():
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([mark], special_tokens=True)
    return tokenizer, tokenizer.get_vocab()[mark]


def _write_processor(
    processor: Processor,
    tokenizer: "PreTrainedTokenizerBase",
    config: MLLMConfig,
    hf: dict[str, Any],
    folder: Path,
) -> None:
    _write_generation(processor, tokenizer, folder)
    if processor.image is None or not isinstance(config.vision, VisionConfig):
        tokenizer.save_pretrained(folder)
        return
    image = _image_processor(processor.image)
    _family(config).processor(image, tokenizer, config, hf).save_pretrained(folder)


def _write_generation(
    processor: Processor, tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> None:
    from transformers import GenerationConfig

    penalty = processor.generation.repetition_penalty
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(processor.eos_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=None if penalty == 1 else penalty,
    ).save_pretrained(folder)


def _image_processor(image: ImageProcessor) -> Any:
    """The image processor of `transformers` that does the same."""
    from transformers import SiglipImageProcessor

    return image.reference or SiglipImageProcessor(
        size={"height": image.size, "width": image.size},
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
