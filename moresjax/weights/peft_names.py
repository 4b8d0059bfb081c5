"""Names of modules in adapter folders of `peft`: which linear, which base parameter they are.

A tensor's name is `base_model.model.`, the module's path in the `transformers` model, and the
parameter. The paths here are those of transformers 5; files of older releases, and of an LLM that
was tuned alone, are brought to them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from moresjax.core.parameter_names import named_parameters
from moresjax.core.patterns import full_match, match_start
from moresjax.models.decoder import Decoder, DecoderConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig, VisionEncoder
from moresjax.tuning.merge import linear_path
from moresjax.weights.families.base import LLM_FAMILIES, VISION_FAMILIES, VisionFamily
from moresjax.weights.families.llava import Llava, two_linears
from moresjax.weights.files import state_dict_name
from moresjax.weights.tensor_mapping import TensorMapping, module_mappings

PREFIX = "base_model.model."
TOWER, CONNECTOR, LLM = "model.vision_tower.", "multi_modal_projector", "model.language_model."
# What stands inside a vision tower in transformers 4.
_INSIDE = "vision_model."
Place = tuple[str, int]  # a site and a layer of it


def canonical(name: str, config: MLLMConfig) -> str:
    """A tensor's or module's name in this model of transformers 5, whatever release wrote it."""
    name = state_dict_name(name.removeprefix(PREFIX))
    name = re.sub(f"^{re.escape(TOWER + _INSIDE)}", TOWER, name)
    if config.vision is None:
        return re.sub(f"^{re.escape(LLM)}", "model.", name)
    inside = (LLM, TOWER, f"model.{CONNECTOR}.", "model.connector.")
    if name.startswith("model.") and not name.startswith(inside):
        return name.replace("model.", LLM, 1)
    return name


def linear_places(config: MLLMConfig) -> dict[str, Place]:
    """Site and layer of every linear that a method may act on, by the module's name.

    Layers of the vision encoder that never run count on behind those that do.
    """
    found: dict[str, Place] = {}
    for site, name in linear_names(config).items():
        count = 1
        if site.startswith("llm."):
            count = config.llm.num_layers
        elif site.startswith("vision.") and isinstance(config.vision, VisionConfig):
            count = config.vision.num_layers
        found |= {name.format(layer): (site, layer) for layer in range(count)}
    return found


def linear_names(config: MLLMConfig) -> dict[str, str]:
    """The module of every site of a linear, `{}` for the layer."""
    maps = {"llm": {k: _in_llm(v, config) for k, v in _llm_map(config.llm).items()}}
    sites = [f"llm.block.{name}" for name in config.llm.linears()]
    if isinstance(config.vision, VisionConfig) and (family := _vision_family(config.vision)):
        vision = family.names({"use_swiglu_ffn": config.vision.gated_mlp})
        maps["vision"] = {k: TOWER + v for k, v in vision.items()}
        sites += [f"vision.block.{name}" for name in config.vision.linears()]
    if config.vision is not None and two_linears(config.connector):
        maps["connector"] = {k: f"model.{v}" for k, v in Llava.connector.items()}
        sites += [f"connector.{name}" for name in config.connector_linears()]
    return {site: maps[site.split(".")[0]][".".join(linear_path(site)[1:])] for site in sites}


def base_mappings(config: MLLMConfig) -> list[TensorMapping]:
    """Where the model's own parameters are; parts that `peft` has no place for are left out."""
    stored = dataclasses.replace(config, llm=dataclasses.replace(config.llm, int8=False))
    model = MLLM(stored)
    llm = module_mappings(model.llm, _llm_map(config.llm))
    found = [mapping.within("llm", "model.", _in_llm("model.", config)) for mapping in llm]
    if isinstance(config.vision, VisionConfig) and (family := _vision_family(config.vision)):
        vision = module_mappings(
            VisionEncoder(config.vision),
            family.names({"use_swiglu_ffn": config.vision.gated_mlp}),
            leading_ones=family.leading_ones,
            first=config.vision.first_blocks,
        )
        found += [mapping.within("vision", "", TOWER) for mapping in vision]
    if model.connector is not None and two_linears(config.connector):
        connector = module_mappings(model.connector, Llava.connector)
        found += [mapping.within("connector", "", "model.") for mapping in connector]
    return found


def runs(name: str, config: MLLMConfig) -> bool:
    """Whether a parameter of the model has a part in what it computes."""
    behind_norm = isinstance(config.vision, VisionConfig) and config.vision.feature_norm_eps
    return not name.startswith(("vision.tail.", *(() if behind_norm else ("vision.post_norm.",))))


def pattern(name: str, layers: Iterable[int] | None = None) -> str:
    """Regex of a module in all layers, or in some; `{}` in the name stands for the layer."""
    number = r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
    return number.join(re.escape(piece) for piece in name.split("{}"))


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether an adapter with this `adapter_config.json` acts on a module, by `peft`'s rules."""
    excluded, targets = config.get("exclude_modules") or (), config.get("target_modules") or ()
    saved = config.get("modules_to_save") or ()
    if _named(excluded, name) or any(
        match_start(rf"(^|.*\.){m}($|\..*)", name, "modules_to_save") for m in saved
    ):
        return False
    layers = config.get("layers_to_transform")
    if not _named(targets, name) or isinstance(targets, str) or layers in (None, []):
        return _named(targets, name)
    layer_lists = config.get("layers_pattern") or r"[^.]*"
    layer_lists = [layer_lists] if isinstance(layer_lists, str) else layer_lists
    found = (
        match_start(rf"(?:^|.*?\.){stack}\.(\d+)\.", name, "layers_pattern")
        for stack in layer_lists
    )
    layer = next((int(m[1]) for m in found if m), None)
    return name in targets or layer in ([layers] if isinstance(layers, int) else layers)


def _named(targets: str | Iterable[str], name: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or full_match(targets, name, "target_modules")
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_llm(name: str, config: MLLMConfig) -> str:
    """An LLM's module in the whole model, which may be a LLaVA."""
    return name.replace("model.", LLM, 1) if config.vision is not None else name


def _llm_map(config: DecoderConfig) -> dict[str, str]:
    """The LLM's name map: its family's, or the one with exactly this decoder's modules."""
    if config.model_type in LLM_FAMILIES:
        return LLM_FAMILIES[config.model_type].name_map
    paths = [*named_parameters(Decoder(config))]
    maps = [family.name_map for family in LLM_FAMILIES.values()]
    return min((each for each in maps if _covers(each, paths)), key=len)


def _vision_family(config: VisionConfig) -> VisionFamily | None:
    """The vision encoder's family, or that with its modules; None if `transformers` has none."""
    family = VISION_FAMILIES.get(config.model_type)
    if family is None:
        paths = [re.sub(r"^(last|tail)\.", "blocks.", path) for path in _paths(config)]
        variant = {"use_swiglu_ffn": config.gated_mlp}
        family = min(
            (each for each in VISION_FAMILIES.values() if _covers(each.names(variant), paths)),
            key=lambda each: len(each.names(variant)),
        )
    return family if family.in_transformers else None


def _paths(config: VisionConfig) -> list[str]:
    return [*named_parameters(VisionEncoder(config))]


def _covers(name_map: Mapping[str, str], paths: Iterable[str]) -> bool:
    return all(path in name_map or path.rpartition(".")[0] in name_map for path in paths)
