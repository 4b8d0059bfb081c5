"""Models to Hugging Face folders that `transformers` loads with equal logits."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from moresjax.core.errors import UserError
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.weights import tables
from moresjax.weights.configs import decoder_config, hf_candidates
from moresjax.weights.files import check_new, renamed
from moresjax.weights.hf import LLAVA, llava_config, model_sources
from moresjax.weights.sources import Source
from moresjax.weights.vision import hf_vision_candidates, vision_config

SHARD_SIZE = "5GB"


def export_hf(
    mllm: MLLM, folder: str | Path, processor: Processor | None = None, shard_size: str = SHARD_SIZE
) -> Path:
    """Writes the base weights, in the dtype they have, with configuration and processor.

    The padding that `aspect="pad"` adds to images has no place in the format: whoever loads the
    folder elsewhere pads before the image processor.

    Args:
      mllm: its tuning is left out.
      folder: new or empty.
      processor: its tokenizer and image processor are saved too.
      shard_size: of the largest file, such as `5GB`; more weights go into several.

    Returns:
      The folder.

    Raises:
      UserError: when no architecture of `transformers` is the model's, or the folder is not empty.
    """
    folder = Path(folder)
    check_new(folder, "export")
    hf = hf_config(mllm.config)
    tokenizer = None if processor is None else processor.tokenizer
    if hf["model_type"] == LLAVA:
        tokenizer, hf["image_token_index"] = _with_image_token(tokenizer, mllm.config)
    hf["dtype"] = str(mllm.llm.embed.table[...].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(mllm, model_sources(mllm.config, hf), folder, shard_size)
    (folder / "config.json").write_text(json.dumps(hf, indent=2, default=str) + "\n")
    if processor is not None:
        _write_processor(processor, tokenizer, mllm.config, hf, folder)
    return folder


def hf_config(config: MLLMConfig) -> dict:
    """The whole `config.json` of the model of `transformers` that computes the same.

    Raises:
      UserError: when there is none.
    """
    run = {"dtype": "float32", "remat": False, "unroll": False, "attention": "auto"}
    llm = dataclasses.replace(config.llm, **run)
    if config.vision is None:
        return _meaning(hf_candidates(llm), decoder_config, llm, "LLM")
    if config.connector != "mlp2x_gelu" or config.vision.is_pair or config.vision.registers:
        raise UserError(
            "a Hugging Face LLaVA has one vision encoder without registers and connector "
            f"mlp2x_gelu; this model has connector {config.connector}"
        )
    keeps_all = config.vision.first_feature == 0
    vision = dataclasses.replace(
        config.vision,
        dtype="float32",
        remat=False,
        unroll=False,
        select="cls_patch" if keeps_all else "patch",
        num_trainable_blocks=0,
    )
    # Normalisation is the image processor's, the choice of features the wrapper's.
    used = ("feature_layer", "select", "drop_first_token", "pixel_mean", "pixel_std")
    kept = {name: getattr(vision, name) for name in used}
    whole = {
        "model_type": LLAVA,
        "vision_config": _meaning(
            hf_vision_candidates(vision), lambda hf: vision_config(hf, **kept), vision, "encoder"
        ),
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": "full" if keeps_all else "default",
        "tie_word_embeddings": llm.tie_embeddings,
        "image_seq_length": config.visual_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }

    def as_llava(text: Mapping):
        return llava_config(whole | {"text_config": text}).llm

    return whole | {"text_config": _meaning(hf_candidates(llm), as_llava, llm, "LLM")}


def _meaning(candidates: Iterator[dict], ours: Callable, wanted, what: str) -> dict:
    """The candidate, completed by its family's defaults, that means the wanted configuration."""
    from transformers import AutoConfig

    for candidate in candidates:
        try:
            whole = AutoConfig.for_model(**candidate).to_dict()
            if ours(whole) == wanted:
                return whole
        except (UserError, ValueError, TypeError):  # not a family for such a configuration
            continue
    raise UserError(f"no architecture of transformers is this {what}: {wanted}")


def _write_tensors(mllm: MLLM, sources: list[Source], folder: Path, shard_size: str) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    flat = nnx.to_flat_state(nnx.state(mllm, nnx.Param))
    values = {tuple(str(part) for part in path): x.get_value() for path, x in flat}
    prefixes = tables.WRITTEN_PREFIXES if mllm.config.vision else {}
    owners = {renamed(name, prefixes): source for source in sources for name in source.names}
    sizes = {
        name: jax.ShapeDtypeStruct(source.tensor_shape, values[source.path].dtype)
        for name, source in owners.items()
    }
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda x: int(np.prod(x.shape)) * x.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in shards.filename_to_tensors.items():
        needed = {owners[name].path: owners[name] for name in names}
        tensors = {}
        for path, source in needed.items():
            made = source.to_tensors(np.asarray(values[path]))
            tensors |= {renamed(name, prefixes): tensor for name, tensor in made.items()}
        tensors = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _with_image_token(tokenizer, config: MLLMConfig):
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
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def _write_processor(processor: Processor, tokenizer, config: MLLMConfig, hf, folder: Path):
    from transformers import GenerationConfig, LlavaProcessor, SiglipImageProcessor

    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(processor.eos_ids),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    if processor.image is None:
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
        patch_size=config.vision.patch_size,
        vision_feature_select_strategy=hf["vision_feature_select_strategy"],
        num_additional_image_tokens=int(config.vision.class_token),
        image_token=IMAGE_MARK,
    ).save_pretrained(folder)
