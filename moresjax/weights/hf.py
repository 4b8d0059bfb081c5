"""Hugging Face folders to models, by the tables of `tables.py`.

Source of the layouts: transformers 5 (`LlamaForCausalLM`, `PhiForCausalLM`, `CLIPVisionModel`,
`SiglipVisionModel`, `LlavaForConditionalGeneration`), and TinyLLaVA Factory's
`TinyLlavaForConditionalGeneration`, whole or as the folders of a training stage.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.models.connector import linear_widths
from moresjax.models.decoder import quantized
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.weights import tables
from moresjax.weights.configs import LLM_TABLES, decoder_config
from moresjax.weights.files import open_tensors
from moresjax.weights.sources import (
    ParameterReader,
    Source,
    Tensor,
    check_tensors,
    module_sources,
)
from moresjax.weights.vision import vision_config, vision_table

LLAVA, TINYLLAVA = "llava", "tinyllava"


def mllm_config(hf: Mapping) -> MLLMConfig:
    """Our configuration of a LLaVA's or an LLM's whole `config.json`.

    Raises:
      UserError: for an architecture that is not supported.
    """
    if hf["model_type"] == LLAVA:
        return llava_config(hf)
    if hf["model_type"] == TINYLLAVA:
        return tinyllava_config(hf)
    return MLLMConfig(llm=decoder_config(hf))


def llava_config(hf: Mapping) -> MLLMConfig:
    """Our configuration of a `LlavaForConditionalGeneration` `config.json`."""
    keeps_all = hf["vision_feature_select_strategy"] == "full"
    llm = decoder_config(hf["text_config"])
    # The wrapper's own head is bare: no bias over Phi, no soft cap over Gemma 2.
    llm = dataclasses.replace(
        llm,
        head_bias=False,
        logit_softcap=0.0,
        tie_embeddings=llm.tie_embeddings or hf.get("tie_word_embeddings", False),
    )
    return MLLMConfig(llm=llm, vision=_tower(hf, keeps_all), connector="mlp2x_gelu")


def tinyllava_config(hf: Mapping) -> MLLMConfig:
    """Our configuration of a TinyLLaVA Factory `config.json`, its two parts completed.

    Raises:
      UserError: for a connector that is not a chain of linears.
    """
    connector = hf["connector_type"]
    if linear_widths(connector, 1, 1) is None:
        raise UserError(
            f"a TinyLLaVA Factory folder with connector {connector!r} is not supported; "
            "identity, linear and mlp{n}x_gelu are"
        )
    keeps_all = hf["vision_feature_select_strategy"] == "cls_patch"
    llm = decoder_config(hf["text_config"])
    return MLLMConfig(llm=llm, vision=_tower(hf, keeps_all), connector=connector)


def _tower(hf: Mapping, keeps_all: bool):
    vision = vision_config(
        hf["vision_config"],
        feature_layer=hf["vision_feature_layer"],
        select="cls_patch" if keeps_all else "patch",
    )
    if vision.registers:  # the references hand them to the LLM
        raise UserError("a LLaVA folder whose vision encoder has register tokens is not supported")
    # "default" drops the first token whether or not it is a class token.
    return dataclasses.replace(vision, drop_first_token=not keeps_all and not vision.class_token)


def _connector_table(config: MLLMConfig, hf: Mapping) -> dict[str, str]:
    if hf["model_type"] == LLAVA:
        return tables.LLAVA_CONNECTOR
    if config.connector == "linear":
        return {"layers.0": "connector"}
    count = len(linear_widths(config.connector, 1, 1)) - 1
    return {f"layers.{i}": f"connector.{2 * i}" for i in range(count)}  # activations between


def model_sources(config: MLLMConfig, hf: Mapping, mesh: Mesh | None = None) -> list[Source]:
    """Where every base parameter is in a model with this whole `config.json`."""
    stored = dataclasses.replace(config, llm=dataclasses.replace(config.llm, int8=False))
    model = MLLM(stored)
    table = LLM_TABLES[hf.get("text_config", hf)["model_type"]]
    llm = module_sources(model.llm, table, mesh=mesh)
    if config.vision is None:
        return [source.under("llm") for source in llm]
    table = vision_table(hf["vision_config"])
    vision = module_sources(model.vision, table, first=config.vision.first_blocks, mesh=mesh)
    connector = module_sources(model.connector, _connector_table(config, hf), mesh=mesh)
    return [
        *(source.under("vision", "", "model.vision_tower.") for source in vision),
        *(source.under("connector", "", "model.") for source in connector),
        *(source.under("llm", "model.", "model.language_model.") for source in llm),
    ]


def import_state(
    config: MLLMConfig,
    hf: Mapping,
    tensors: Mapping[str, Tensor],
    *,
    part: str = "",
    mesh: Mesh | None = None,
    where: str = "checkpoint",
) -> ParameterReader:
    """Base parameters by name, each read straight to where it belongs.

    Args:
      config, hf: our configuration, and the whole `config.json` it was made from.
      tensors: by their names in the state dict of `transformers`.
      part: of the model to read, such as `llm`; default: all.
      mesh: devices to split the parameters over.
      where: name of the tensors' origin, for messages.

    Raises:
      UserError: that lists the tensors which are missing, unknown or of another shape.
    """
    sources = model_sources(config, hf, mesh)
    unused = (*tables.UNUSED, *(("lm_head.",) if config.llm.tie_embeddings else ()))
    check_tensors(sources, tensors, unused, where)
    chosen = [source for source in sources if part in ("", source.path[0])]
    return ParameterReader(chosen, tensors)


def build_model(config: MLLMConfig, state: Mapping[str, jax.Array], tuning: str = "none") -> MLLM:
    """A model with the given base parameters and freshly initialised tuning parameters."""
    model = MLLM(config, tuning)
    set_params(model, state, "checkpoint")
    model.tuning.initialize()
    return model


def read_hf_config(folder: Path) -> dict:
    """The whole configuration of a folder; what its file leaves out has its family's defaults.

    Raises:
      UserError: when there is none, or `transformers` does not know the architecture.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        raw = json.loads(file.read_text())
        if raw.get("model_type") != TINYLLAVA:  # of which transformers knows the parts only
            return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        whole = {key: AutoConfig.for_model(**raw[key]) for key in ("text_config", "vision_config")}
        return raw | {key: config.to_dict() for key, config in whole.items()}
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be used: {reason}") from None


def is_llava(folder: Path) -> bool:
    """Whether a folder is a `LlavaForConditionalGeneration`'s, whose tokenizer knows images."""
    return json.loads((folder / "config.json").read_text()).get("model_type") == LLAVA


def pretrained_config(folder: str | Path) -> MLLMConfig:
    """Architecture of a folder with a `config.json`.

    Raises:
      UserError: when there is none or the architecture is not supported.
    """
    return mllm_config(read_hf_config(Path(folder)))


def read_pretrained(
    folder: str | Path,
    *,
    part: str = "",
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
) -> tuple[MLLMConfig, ParameterReader]:
    """Configuration and base parameters of a folder; see `import_state`.

    Args:
      folder: with `config.json` and safetensors, of a LLaVA or of an LLM.
      part: of the model to read; default: all.
      allow_pickle: whether `*.bin` files may be read where there are no safetensors.
      mesh: devices to split the parameters over.

    Raises:
      UserError: when the folder is not a checkpoint or its architecture is not supported.
    """
    folder = Path(folder)
    hf = read_hf_config(folder)
    config = mllm_config(hf)
    tensors = open_tensors(folder, allow_pickle=allow_pickle)
    return config, import_state(config, hf, tensors, part=part, mesh=mesh, where=str(folder))


def load_pretrained(
    folder: str | Path, tuning: str = "none", *, quantize: str = "", **options
) -> MLLM:
    """The model of a folder.

    Args:
      folder: see `read_pretrained`.
      tuning: freshly attached.
      quantize: `int8` for the LLM's blocks in eight bits.
      options: those of `read_pretrained`.

    Raises:
      UserError: when the folder is not a checkpoint or its architecture is not supported.
    """
    config, parameters = read_pretrained(folder, **options)
    config = dataclasses.replace(config, llm=quantized(config.llm, quantize))
    return build_model(config, parameters, tuning)
