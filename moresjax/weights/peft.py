"""Adapter folders of Hugging Face `peft`, in and out.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. A tensor's name is
`base_model.model.`, the module's path in the `transformers` model, and the parameter. Target
modules are written as a regex over whole paths, which no vision tower matches.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from moresjax.core.errors import UserError, choice_error
from moresjax.core.parameter_names import matches, named_parameters, path_name
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import METHODS, VirtualTokens
from moresjax.tuning.merge import dense_at, linear_path
from moresjax.tuning.methods.ln import NormTuning
from moresjax.tuning.spec import format_spec
from moresjax.weights.families.base import LLM_FAMILIES, renamed
from moresjax.weights.families.llava import Llava
from moresjax.weights.files import file_prefixes
from moresjax.weights.peft_formats import (
    NORMS,
    PEFT_TYPES,
    PEFT_VERSION,
    Format,
    format_of,
    read_format,
)
from moresjax.weights.peft_virtual_tokens import (
    TENSOR,
    VIRTUAL_TOKEN_METHODS,
    VIRTUAL_TOKEN_TYPES,
    virtual_tokens_from_peft,
    virtual_tokens_to_peft,
)
from moresjax.weights.tensor_mapping import TensorMapping, module_mappings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONNECTOR = "multi_modal_projector"
Arrays = dict[str, np.ndarray]


def export_peft(mllm: MLLM, folder: str | Path, *, connector: bool = False) -> Path:
    """Writes the attached method as an adapter folder of `peft`; returns the folder.

    Args:
      mllm: A model with one attached method.
      folder: The folder to write.
      connector: Whether to write the connector of a LLaVA too, as one of `modules_to_save`.

    Raises:
      UserError: when `peft` has no such method, or cannot hold the combination.
    """
    mllm.tuning.check_single("a folder of peft")
    if len(mllm.tuning.methods) != 1:
        raise UserError(f"peft holds one method, the model's tuning is {mllm.tuning.spec!r}")
    method, folder = mllm.tuning.methods[0][1], Path(folder)
    if isinstance(method, NormTuning):
        arrays, config = _norms_to_peft(mllm)
    elif isinstance(method, VirtualTokens) and method.name in VIRTUAL_TOKEN_METHODS:
        if connector:
            raise UserError(f"an adapter of peft with {method.name} cannot hold a connector")
        arrays, config = virtual_tokens_to_peft(mllm, method)
    else:
        arrays, config = _linears_to_peft(mllm, format_of(method))
    if connector:
        parameters = _parameters(mllm)
        for mapping in _connector_mappings(mllm):
            arrays |= mapping.to_hf(np.asarray(parameters[path_name(mapping.path)]))
        config["modules_to_save"] = [CONNECTOR]
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": PEFT_VERSION}
    folder.mkdir(parents=True, exist_ok=True)
    named = {_file_name(n): np.ascontiguousarray(x, np.float32) for n, x in arrays.items()}
    save_file(named, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _linears_to_peft(mllm: MLLM, form: Format) -> tuple[Arrays, dict[str, Any]]:
    key, method = mllm.tuning.methods[0]
    arrays, patterns, on_input = {}, [], []
    for site, variables in mllm.tuning.params[key].items():
        if not site.startswith("llm."):
            raise UserError(f"an adapter of peft is written for the LLM only, not for {site}")
        name, kernel = _linear_name(mllm, site), _kernels(mllm, site)
        layers = np.flatnonzero(mllm.tuning.layer_masks[key][site][...]).tolist()
        for leaf, x in variables.items():
            for i in layers:
                value = form.leaves[leaf].to_peft(np.asarray(x[i]), kernel[i])
                arrays[f"{name.format(i)}.{form.leaves[leaf].name}"] = value
        choice = layers if len(layers) < len(kernel) else None
        patterns.append(_pattern(name, choice))
        if "scale_in" in variables:
            on_input.append(patterns[-1])
    for leaf, x in mllm.tuning.common(key).items():
        arrays[form.shared[leaf].name] = form.shared[leaf].to_peft(np.asarray(x), None)
    config: dict[str, Any] = {"peft_type": form.peft_type}
    config |= {**form.config(method), **form.neutral, "target_modules": "|".join(patterns)}
    if form.peft_type == "IA3":
        config["feedforward_modules"] = "|".join(on_input) or []
    return arrays, config


def _norms_to_peft(mllm: MLLM) -> tuple[Arrays, dict[str, Any]]:
    arrays, parameters = {}, _parameters(mllm)
    for ours, names in _norm_names(mllm).items():
        stacked = np.asarray(parameters[ours]).reshape(len(names), -1)
        arrays |= dict(zip(names, stacked, strict=True))
    modules = {name.partition(".ln_tuning_layers.")[0] for name in arrays}
    # Where a whole stack of layers is meant, the numbers say no more than \d+ would.
    patterns = sorted({_pattern(re.sub(r"\.\d+\.", ".{}.", _in_model(mllm, m))) for m in modules})
    arrays = {_in_model(mllm, name): x for name, x in arrays.items()}
    return arrays, {"peft_type": NORMS, "target_modules": "|".join(patterns)}


def import_peft(folder: str | Path, mllm: MLLM) -> str:
    """Attaches an adapter folder of `peft`, replacing the attached tuning; returns its spec string.

    LN tuning and a saved connector replace parameters of the model itself.

    Raises:
      UserError: when the folder is not a safetensors adapter, its method or one of its settings
        is not supported, or its tensors are not those of this model; the message lists them.
    """
    folder = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not an adapter of peft: it has no {file}")
    config = json.loads((folder / CONFIG).read_text())
    types = (*PEFT_TYPES, *VIRTUAL_TOKEN_TYPES)
    if config.get("peft_type") not in types:
        raise choice_error("peft_type", config.get("peft_type"), types)
    stored = load_file(folder / TENSORS)
    arrays = {_relative(name): np.asarray(x, np.float32) for name, x in stored.items()}
    tensors = _Tensors(arrays, str(folder))
    base: Arrays = {}
    if CONNECTOR in (config.get("modules_to_save") or ()):
        for mapping in _connector_mappings(mllm):
            tensor = tensors.take(mapping.names[0], mapping.tensor_shape)
            base[path_name(mapping.path)] = mapping.from_hf(tensor, (slice(None),) * tensor.ndim)
    if config["peft_type"] == NORMS:
        tuning = Tuning(NormTuning.name, mllm.config)
        shapes = {n: x.shape for n, x in _parameters(mllm).items()}
        for ours, names in _norm_names(mllm).items():
            rows = [tensors.take(name, shapes[ours][-1:]) for name in names]
            base[ours] = np.stack(rows).reshape(shapes[ours])
    elif config["peft_type"] in VIRTUAL_TOKEN_TYPES:
        tensor = tensors.take(TENSOR)
        tensors.finish()
        tuning = virtual_tokens_from_peft(mllm.config, config["peft_type"], tensor, str(folder))
    else:
        tuning = _linears_from_peft(mllm, read_format(config), config, tensors)
    tensors.finish()
    set_params(mllm, {name: jnp.asarray(x) for name, x in base.items()}, str(folder))
    mllm.tuning = tuning
    return tuning.spec


def _linears_from_peft(
    mllm: MLLM, form: Format, config: Mapping[str, Any], tensors: "_Tensors"
) -> Tuning:
    linears = [f"llm.block.{name}" for name in mllm.config.llm.linears()]
    names = {site: _relative(_linear_name(mllm, site)) for site in linears}
    layers = range(mllm.config.llm.num_layers)
    ends = {leaf.name for leaf in form.leaves.values()}
    found = {
        site: [i for i in layers if any(f"{name.format(i)}.{end}" in tensors.left for end in ends)]
        for site, name in names.items()
    }
    found = {site: chosen for site, chosen in found.items() if chosen}
    chosen = next(iter(found.values()), [])
    if not found:
        raise UserError(
            f"{tensors.source} holds no {form.method} of this model's LLM, only: "
            f"{', '.join([*tensors.left][:8])}"
        )
    if any(other != chosen for other in found.values()):
        raise UserError(
            f"{tensors.source}: the adapter must act on the same layers at every linear, it acts "
            f"on {found}"
        )
    examples = {
        end: x for name, x in tensors.left.items() for end in ends if name.endswith(f".{end}")
    }
    keys = form.keys(config, examples)
    every = list(found) == linears
    keys["targets"] = "all" if every else ";".join(site.split(".")[-1] for site in found)
    keys["layers"] = "all" if chosen == [*layers] else ";".join(map(str, chosen))
    method = METHODS[form.method](**keys)
    tuning = Tuning(format_spec([method]), mllm.config)
    tuning.initialize()
    for site in found:
        kernel = _kernels(mllm, site)
        for leaf, variable in tuning.params[form.method][site].items():
            values = np.array(variable[...])
            for i in chosen:
                shape = form.leaves[leaf].to_peft(values[i], kernel[i]).shape
                x = tensors.take(f"{names[site].format(i)}.{form.leaves[leaf].name}", shape)
                values[i] = form.leaves[leaf].from_peft(x, kernel[i])
            variable[...] = jnp.asarray(values)
    for leaf, x in tuning.common(form.method).items():
        # Without them in the file, the seed has made the ones that peft would make.
        if form.shared[leaf].name in tensors.left:
            stored = tensors.take(form.shared[leaf].name, x.shape[::-1])
            tuning.shared[form.method][leaf][...] = form.shared[leaf].from_peft(stored, None)
    return tuning


class _Tensors:
    """The tensors of a file that nothing has asked for yet, and the names of those it lacks."""

    def __init__(self, arrays: Arrays, source: str) -> None:
        self.left, self.source = dict(arrays), source
        self.missing: list[str] = []

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor; zeros in place of one that the file lacks, which `finish` reports.

        Raises:
          UserError: for a tensor of another shape.
        """
        x = self.left.pop(name, None)
        if x is None:
            self.missing.append(name)
            return np.zeros(shape or (), np.float32)
        if shape is not None and x.shape != shape:
            raise UserError(f"{self.source}: {name} has shape {x.shape}, the model needs {shape}")
        return x

    def finish(self) -> None:
        """Raises a `UserError` when tensors were missing, or some are left that nobody took."""
        for what, names in (("lacks", self.missing), ("holds unknown", [*self.left])):
            if names:
                listed = ", ".join(names[:8])
                raise UserError(f"{self.source} {what} tensors ({len(names)}): {listed}")


# Names


def _llm_map(config: DecoderConfig) -> dict[str, str]:
    """The LLM's name map: its family's, or the one with exactly this decoder's modules."""
    if config.model_type in LLM_FAMILIES:
        return LLM_FAMILIES[config.model_type].name_map
    paths = named_parameters(Decoder(config))

    def covers(name_map: dict[str, str]) -> bool:
        return all(path in name_map or path.rpartition(".")[0] in name_map for path in paths)

    maps = [family.name_map for family in LLM_FAMILIES.values()]
    return min((name_map for name_map in maps if covers(name_map)), key=len)


def _linear_name(mllm: MLLM, site: str) -> str:
    """Path of a linear in the `transformers` model, `{}` for the layer."""
    name = _llm_map(mllm.config.llm)[".".join(linear_path(site)[1:])]
    return _in_model(mllm, name)


def _norm_names(mllm: MLLM) -> dict[str, list[str]]:
    """For each of our norm parameters the names of its layers, as for an LLM alone."""
    names = {}
    for mapping in module_mappings(mllm.llm, _llm_map(mllm.config.llm)):
        ours = f"llm.{path_name(mapping.path)}"
        if any(matches(ours, pattern) for pattern in NormTuning().trains):
            split = (name.rpartition(".") for name in mapping.names)
            names[ours] = [f"{module}.ln_tuning_layers.{leaf}" for module, _, leaf in split]
    return names


def _connector_mappings(mllm: MLLM) -> list[TensorMapping]:
    """Where every parameter of a LLaVA's connector is."""
    if mllm.connector is None or mllm.config.connector != "mlp2x_gelu":
        raise UserError("an adapter of peft holds a connector of kind mlp2x_gelu only")
    mappings = module_mappings(mllm.connector, Llava.connector)
    return [mapping.within("connector", "", "model.") for mapping in mappings]


def _in_model(mllm: MLLM, name: str) -> str:
    """An LLM's module in the whole model, which may be a LLaVA."""
    return name.replace("model.", "model.language_model.", 1) if mllm.config.vision else name


def _file_name(name: str) -> str:
    whole = name.startswith("base_model.") or name == TENSOR
    return name if whole else f"base_model.model.{name}"


def _relative(name: str) -> str:
    """A tensor's name as in the LLM alone, whatever layout of LLaVA its file has."""
    name = name.removeprefix("base_model.model.")
    name = renamed(name, file_prefixes())
    return name.replace("model.language_model.", "model.", 1)


def _pattern(name: str, layers: Iterable[int] | None = None) -> str:
    """Regex of a module in all layers, or in some."""
    number = r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
    return number.join(re.escape(piece) for piece in name.split("{}"))


def _kernels(mllm: MLLM, site: str) -> np.ndarray:
    layers = range(mllm.config.llm.num_layers)
    return np.stack([np.asarray(dense_at(mllm, site, layer)) for layer in layers])


def _parameters(mllm: MLLM) -> dict[str, jax.Array]:
    return {name: variable.get_value() for name, variable in named_parameters(mllm).items()}
