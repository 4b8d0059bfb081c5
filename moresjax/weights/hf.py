"""Hugging Face checkpoints to moresjax states, by the tables of `tables.py`.

Source of the layouts: transformers 5 (`LlamaForCausalLM`, `PhiForCausalLM`, `CLIPVisionModel`,
`SiglipVisionModel`, `LlavaForConditionalGeneration`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from moresjax.errors import UserError
from moresjax.models.initialize import fill
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.paths import path_name
from moresjax.weights import tables
from moresjax.weights.configs import LLM_TABLES, decoder_config
from moresjax.weights.vision import vision_config, vision_table

Path_ = tuple[str, ...]


def llava_config(hf: Mapping) -> MLLMConfig:
    """Our configuration of a `LlavaForConditionalGeneration` `config.json`."""
    keeps_all = hf["vision_feature_select_strategy"] == "full"
    llm = decoder_config(hf["text_config"])
    vision = vision_config(
        hf["vision_config"],
        feature_layer=hf["vision_feature_layer"],
        select="cls_patch" if keeps_all else "patch",
    )
    if vision.registers:  # transformers hands them to the LLM
        raise UserError("a LLaVA folder whose vision encoder has register tokens is not supported")
    return MLLMConfig(
        # The wrapper's own head is bare: no bias over Phi, no soft cap over Gemma 2.
        llm=dataclasses.replace(
            llm,
            head_bias=False,
            logit_softcap=0.0,
            tie_embeddings=llm.tie_embeddings or hf.get("tie_word_embeddings", False),
        ),
        # "default" drops the first token whether or not it is a class token.
        vision=dataclasses.replace(
            vision, drop_first_token=not keeps_all and not vision.class_token
        ),
        connector="mlp2x_gelu",
    )


def _component_tables(hf: Mapping) -> dict[str, tuple[dict, str]]:
    """Table and name prefix of every component of a checkpoint with this configuration."""
    if hf["model_type"] == "llava":
        return {
            "llm": (LLM_TABLES[hf["text_config"]["model_type"]], ""),
            "vision": (vision_table(hf["vision_config"]), "model.vision_tower."),
            "connector": (tables.LLAVA_CONNECTOR, "model."),
        }
    return {"llm": (LLM_TABLES[hf["model_type"]], "")}


def _hf_leaf(path: Path_, table: Mapping[str, str]) -> tuple[str, str]:
    """Name pattern and leaf kind of one of our parameters."""
    for end in (len(path), len(path) - 1):
        if name := table.get(".".join(path[:end])):
            leaf = path[-1]
            if end == len(path):
                return name, "vector" if leaf == "cls" else "copy"
            return f"{name}.{'bias' if leaf == 'bias' else 'weight'}", leaf
    raise KeyError(".".join(path))


def _to_ours(tensor: np.ndarray, kind: str) -> np.ndarray:
    if kind == "vector":
        return tensor.reshape(-1)
    if kind != "kernel":
        return tensor[0] if tensor.ndim == 3 else tensor  # DINOv2 has a batch axis of one
    if tensor.ndim == 4:  # convolution [D, 3, patch, patch] -> [patch * patch * 3, D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def parameter_sources(config: MLLMConfig, hf: Mapping) -> Iterator[tuple[Path_, list[str], str]]:
    """(path in our model, Hugging Face names in layer order, leaf kind) of every base parameter."""
    llava = hf["model_type"] == "llava"
    by_component = _component_tables(hf)
    for path, variable in nnx.to_flat_state(nnx.state(MLLM(config), nnx.Param)):
        path = tuple(str(p) for p in path)
        table, prefix = by_component[path[0]]
        first = config.vision.used_layers if path[1] == "tail" else 0
        names, kind = module_source(path[1:], variable.shape, table, first)
        names = [prefix + name for name in names]
        if llava and path[0] == "llm":
            names = [name.replace("model.", "model.language_model.", 1) for name in names]
        yield path, names, kind


def module_source(
    path: Path_, shape: tuple[int, ...], table: Mapping[str, str], first: int
) -> tuple[list[str], str]:
    """(Hugging Face names in layer order, leaf kind) of one parameter of a tower.

    `first` is the layer number of the first block in `tail`: the blocks above the feature layer
    continue the numbering.
    """
    stacked = ("blocks", *path[1:]) if path[0] == "tail" else path
    name, kind = _hf_leaf(stacked, table)
    return [name.format(first + i) for i in range(shape[0])] if "{}" in name else [name], kind


def import_state(
    config: MLLMConfig, hf: Mapping, get: Callable[[str], np.ndarray], available: Iterable[str]
) -> dict[Path_, jax.Array]:
    """Base parameters by path, read tensor by tensor with `get`.

    Raises:
      UserError: when tensors are missing; the message lists them.
    """
    return read_sources(parameter_sources(config, hf), get, available)


def read_sources(
    sources: Iterable[tuple[Path_, list[str], str]],
    get: Callable[[str], np.ndarray],
    available: Iterable[str],
) -> dict[Path_, jax.Array]:
    """The parameters that `sources` describes, read tensor by tensor with `get`.

    Raises:
      UserError: when tensors are missing; the message lists them.
    """
    sources, available = list(sources), set(available)
    missing = [n for _, names, _ in sources for n in names if n not in available]
    if missing:
        raise UserError(f"checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")
    state = {}
    for path, names, kind in sources:
        parts = [_to_ours(np.asarray(get(name)), kind) for name in names]
        stacked = "blocks" in path or "tail" in path
        state[path] = jnp.asarray(np.stack(parts) if stacked else parts[0])
    return state


def build_model(config: MLLMConfig, state: Mapping[Path_, jax.Array], tuning: str = "none") -> MLLM:
    """A model with the given base parameters and freshly initialised tuning parameters."""
    model = MLLM(config, tuning)
    fill(model, {path_name(path): x for path, x in state.items()}, "checkpoint")
    model.tuning.initialize()
    return model


def read_hf_config(folder: Path) -> dict:
    """The whole configuration of a folder; what its file leaves out has its family's defaults."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # transformers raises many kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/config.json cannot be used: {reason}") from None


def _state_dict_name(name: str) -> str:
    """Name in the model's state dict of a tensor in a file, which may have an older layout."""
    for old, new in tables.FILE_MODULES.items():
        name = name.replace(old, new)
    for old, new in tables.FILE_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def pretrained_config(folder: str | Path) -> MLLMConfig:
    """Architecture of a folder with a `config.json`.

    Raises:
      UserError: when there is none or the architecture is not supported.
    """
    return _mllm_config(read_hf_config(Path(folder)))


def _mllm_config(hf: Mapping) -> MLLMConfig:
    return llava_config(hf) if hf["model_type"] == "llava" else MLLMConfig(llm=decoder_config(hf))


def load_pretrained(folder: str | Path, tuning: str = "none") -> MLLM:
    """Loads a folder with `config.json` and safetensors.

    Raises:
      UserError: when the folder is not a checkpoint or its architecture is not supported.
    """
    folder = Path(folder)
    hf = read_hf_config(folder)
    config = _mllm_config(hf)
    tensors = tensor_readers(folder)
    state = import_state(config, hf, lambda name: tensors[name](), tensors)
    return build_model(config, state, tuning)


def tensor_readers(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """A reader for every tensor of a folder's safetensors, by its name in the state dict.

    Raises:
      UserError: when there is no file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file")
    readers = {}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
        for name in names:
            read = functools.partial(_read_tensor, file, name)
            ours = _state_dict_name(name)
            readers[ours] = read
            for whole, halves in tables.FILE_HALVES.items():
                for number, half in enumerate(halves if whole in ours else ()):
                    readers[ours.replace(whole, half)] = functools.partial(_half, read, number)
    return readers


def _read_tensor(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensor(name)


def _half(read: Callable[[], np.ndarray], number: int) -> np.ndarray:
    return np.split(read(), 2)[number]
