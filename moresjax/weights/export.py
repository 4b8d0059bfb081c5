"""Models to Hugging Face folders that `transformers` loads with equal logits."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors.numpy import save_file

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters, path_name
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.merge import check_stacked
from moresjax.weights.families.base import hf_decoder_config
from moresjax.weights.families.llava import WRITTEN_PREFIXES, Llava
from moresjax.weights.files import check_new, renamed
from moresjax.weights.hf import model_mappings
from moresjax.weights.tensor_mapping import TensorMapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_SIZE = "5GB"


def export_hf(
    mllm: MLLM, folder: str | Path, processor: Processor | None = None, shard_size: str = SHARD_SIZE
) -> Path:
    """Writes the base weights, in the dtype they have, with configuration and processor.

    The padding that `aspect="pad"` adds to images has no place in the format: whoever loads the
    folder elsewhere pads before the image processor.

    Args:
      mllm: The model; its tuning is left out.
      folder: A new or empty folder.
      processor: Its tokenizer and image processor are saved too.
      shard_size: The size of the largest file, such as `5GB`; more weights go into several.

    Returns:
      The folder.

    Raises:
      UserError: when no architecture of `transformers` is the model's, or the folder is not empty.
    """
    folder = Path(folder)
    check_new(folder, "export")
    hf = hf_config(mllm.config)
    tokenizer: Any = None if processor is None else processor.tokenizer
    if hf["model_type"] == Llava.model_type:
        tokenizer, hf["image_token_index"] = _with_image_token(tokenizer, mllm.config)
    hf["dtype"] = str(mllm.llm.embed.table[...].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(mllm, model_mappings(mllm.config, hf), folder, shard_size)
    (folder / "config.json").write_text(json.dumps(hf, indent=2, default=str) + "\n")
    if processor is not None and tokenizer is not None:
        _write_processor(processor, tokenizer, mllm.config, hf, folder)
    return folder


def hf_config(config: MLLMConfig) -> dict[str, Any]:
    """The whole `config.json` of the model of `transformers` that computes the same.

    Raises:
      UserError: when there is none.
    """
    run = {"dtype": "float32", "remat": False, "unroll": False}
    llm, vision = dataclasses.replace(config.llm, **run, attention="auto"), config.vision
    if vision is None:
        return hf_decoder_config(llm)
    if isinstance(vision, VisionConfig):
        vision = dataclasses.replace(vision, **run)
    return Llava().to_hf(dataclasses.replace(config, llm=llm, vision=vision))


def _write_tensors(
    mllm: MLLM, mappings: list[TensorMapping], folder: Path, shard_size: str
) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    check_stacked(mllm)
    values = {name: x.get_value() for name, x in named_parameters(mllm).items()}
    prefixes = WRITTEN_PREFIXES if mllm.config.vision else {}
    owners = {renamed(name, prefixes): mapping for mapping in mappings for name in mapping.names}
    sizes = {
        name: jax.ShapeDtypeStruct(mapping.tensor_shape, values[path_name(mapping.path)].dtype)
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
            made = mapping.to_hf(np.asarray(values[path]))
            tensors |= {renamed(name, prefixes): tensor for name, tensor in made.items()}
        tensors = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _with_image_token(
    tokenizer: "PreTrainedTokenizerBase | None", config: MLLMConfig
) -> "tuple[PreTrainedTokenizerBase | None, int]":
    """The tokenizer, with a token that stands for a visual token, and that token's id.

    Without a tokenizer it is the last id.
    """
    vocab = config.llm.vocab_size
    if tokenizer is None:
        return None, vocab - 1
    if IMAGE_MARK not in tokenizer.get_vocab():
        if len(tokenizer) >= vocab:
            raise UserError(
                f"the tokenizer has no {IMAGE_MARK} token, and the LLM's {vocab} embeddings leave "
                "no place for one"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    return tokenizer, tokenizer.get_vocab()[IMAGE_MARK]


def _write_processor(
    processor: Processor,
    tokenizer: "PreTrainedTokenizerBase",
    config: MLLMConfig,
    hf: dict[str, Any],
    folder: Path,
) -> None:
    from transformers import GenerationConfig, LlavaProcessor, SiglipImageProcessor

    penalty = processor.generation.repetition_penalty
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(processor.eos_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=None if penalty == 1 else penalty,
    ).save_pretrained(folder)
    vision = config.vision
    if processor.image is None or not isinstance(vision, VisionConfig):
        tokenizer.save_pretrained(folder)
        return
    image = processor.image.reference or SiglipImageProcessor(
        size={"height": processor.image.size, "width": processor.image.size},
        image_mean=list(processor.image.mean),
        image_std=list(processor.image.std),
    )
    LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=hf["vision_feature_select_strategy"],
        num_additional_image_tokens=int(vision.class_token),
        image_token=IMAGE_MARK,
    ).save_pretrained(folder)
