"""The model's own parameters in an adapter folder of `peft`: whole modules, norms and biases.

What `modules_to_save`, LN tuning and `bias` replace is here what `partial` and `ln` train.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import layered_parameters, matches, path_name
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.base import Method
from moresjax.tuning.methods.full import PARTS, Partial
from moresjax.tuning.methods.ln import NormTuning
from moresjax.weights.peft_modules import Tensors
from moresjax.weights.peft_names import CONNECTOR, base_mappings, canonical, runs

Arrays = dict[str, np.ndarray]
NORM_COPY = "ln_tuning_layers"
# The modules of `peft` that are a whole part of ours.
_MODULES = {"connector": CONNECTOR, "lm_head": "lm_head", "vision": "vision_tower"}
_HEAD = "lm_head.weight"


def read_base(mllm: MLLM, config: Mapping[str, Any], tensors: Tensors) -> Arrays:
    """Whole new values of the model's own parameters that a file has tensors of, by name.

    Args:
      mllm: The model; layers without a tensor keep its values.
      config: The content of `adapter_config.json`.
      tensors: The file; what is found is taken out of it.

    Raises:
      UserError: when the model has no module of `modules_to_save`, or ties what would differ.
    """
    mappings = base_mappings(mllm.config)
    owners = {name: (m, number) for m in mappings for number, name in enumerate(m.names)}
    values: Arrays = {}
    found = set()
    for name in [*tensors.left]:
        plain = re.sub(rf"\.(base_layer|{NORM_COPY})\.", ".", name)
        if plain not in owners:
            continue
        mapping, number = owners[plain]
        tensor = tensors.take(name, mapping.tensor_shape)
        found.add(plain)
        path = path_name(mapping.path)
        if not runs(path, mllm.config):
            tensors.unused.append(name)
            continue
        x = mapping.from_hf(tensor, (slice(None),) * len(mapping.layer_shape))
        if mapping.stacked:
            values.setdefault(path, _value(mllm, path).copy())[number] = x
        else:
            values[path] = x
    _check_saved(mllm.config, config.get("modules_to_save") or (), owners, found, tensors)
    if mllm.config.llm.tie_embeddings:
        _check_tied(mllm, config, values, tensors)
    return values


def _value(mllm: MLLM, path: str) -> np.ndarray:
    layers = [np.asarray(x.get_value(), np.float32) for x in layered_parameters(mllm)[path]]
    return layers[0] if len(layers) == 1 else np.stack(layers)


def _check_saved(
    config: MLLMConfig,
    modules: Sequence[str],
    owners: Mapping[str, Any],
    found: Collection[str],
    tensors: Tensors,
) -> None:
    """Records what is missing of whole modules."""
    for module in modules:
        ends = (module, canonical(f"{module}.", config).rstrip("."))
        inside = {
            name
            for name, (mapping, _) in owners.items()
            if any(path.endswith(ends) for path in _parents(name))
            and runs(path_name(mapping.path), config)
        }
        if not inside and not (module.endswith("lm_head") and config.llm.tie_embeddings):
            raise UserError(f"{tensors.source} saves the module {module!r}, which is not here")
        tensors.missing += sorted(inside - set(found))


def _parents(name: str) -> list[str]:
    """The paths of the modules that a parameter is in."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces))]


def _check_tied(
    mllm: MLLM, config: Mapping[str, Any], values: Mapping[str, np.ndarray], tensors: Tensors
) -> None:
    """Refuses an adapter that gives embeddings and head of a model that ties them other values."""
    table, head = values.get("llm.embed.table"), tensors.left.pop(_HEAD, None)
    if head is None and (table is None or config.get("ensure_weight_tying")):
        return
    old = _value(mllm, "llm.embed.table")
    table, head = old if table is None else table, old if head is None else head
    if not np.array_equal(table, head):
        raise UserError(
            f"{tensors.source} has embeddings and a head of different values, which this model "
            "ties; load a model with tie_word_embeddings=false"
        )


def base_methods(config: MLLMConfig, names: Collection[str], source: str) -> list[Method]:
    """The methods that train these parameters of the model itself.

    Args:
      config: The model's configuration.
      names: Names of parameters.
      source: What error messages call their origin.

    Raises:
      UserError: when other parameters are among them.
    """
    left, parts, methods = set(names), [], []

    def take(part: str) -> None:
        own = {name for name in left if matches(name, PARTS[part])}
        if any(not name.endswith(".bias") for name in own):
            parts.append(part)
            left.difference_update(own)

    for part in ("connector", "lm_head", "embed"):
        take(part)
    norms = {name.removesuffix(".scale") for name in left if name.endswith("norm.scale")}
    if any(matches(n, PARTS["vision"]) and not n.endswith(("norm.scale", ".bias")) for n in left):
        take("vision")
        norms = {name for name in norms if not name.startswith("vision.")}
    if norms:
        methods.append(NormTuning(targets=_norm_targets(config, norms)))
        left -= {name for name in left if name.rpartition(".")[0] in norms}
    if left and all(name.endswith(".bias") for name in left):
        parts.append("biases")
    elif left:
        raise UserError(
            f"{source} cannot be: peft has connector, embeddings, head, vision encoder, norms and "
            f"biases of the model itself, but not {', '.join(sorted(left)[:4])}"
        )
    return [*([Partial(train=";".join(parts))] if parts else []), *methods]


def _norm_targets(config: MLLMConfig, norms: Collection[str]) -> str:
    """What `ln:targets=` calls these norms."""
    names = {
        ("vision." if norm.startswith("vision.") else "") + norm.rpartition(".")[2]
        for norm in norms
    }
    every = {"all": {*config.llm.norms()} - {"q_norm", "k_norm"}}
    if isinstance(config.vision, VisionConfig):
        every["vision.all"] = {f"vision.{name}" for name in config.vision.norms()}
    targets = []
    for target, own in every.items():
        if own <= names:
            targets.append(target)
            names -= own
    return ";".join([*targets, *sorted(names)])


def write_base(
    mllm: MLLM, names: Collection[str], adapted: Collection[str]
) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and settings for parameters of the model itself.

    Args:
      mllm: The model.
      names: Names of the parameters that trained.
      adapted: The modules that the adapter acts on.

    Raises:
      UserError: when `peft` cannot hold them.
    """
    mappings = base_mappings(mllm.config)
    saved, biases = [], False
    arrays: Arrays = {}
    for method in base_methods(mllm.config, names, "an adapter of peft with what trained here"):
        for part in method.train.split(";") if isinstance(method, Partial) else ():
            if part == "biases":
                biases = True
                continue
            own = [m for m in mappings if matches(path_name(m.path), PARTS[part])]
            if part == "vision":
                own = [m for m in mappings if m.path[0] == "vision"]
            if not own:
                raise _no_place(f"the {part}")
            saved.append(_MODULES.get(part) or own[0].names[0].rpartition(".")[0])
            arrays |= _tensors(mllm, own)
        if isinstance(method, NormTuning):
            own = [m for m in mappings if any(matches(path_name(m.path), p) for p in method.trains)]
            arrays |= (norms := _tensors(mllm, own))
            saved += sorted({name.rpartition(".")[0] for name in norms})
    if lost := sorted(set(names) - {path_name(m.path) for m in mappings}):
        raise _no_place(lost[0])
    if both := [m for m in adapted if any(m.endswith(s) or f"{s}." in m for s in saved)]:
        raise UserError(f"peft either adapts {both[0]} or saves all of it; here both trained")
    settings: dict[str, Any] = {"modules_to_save": saved} if saved else {}
    if biases:
        settings["bias"] = "all"
        trained = [m for m in mappings if path_name(m.path) in names and m.path[-1] == "bias"]
        for name, x in _tensors(mllm, trained).items():
            module = name.removesuffix(".bias")
            arrays.setdefault(f"{module}.base_layer.bias" if module in adapted else name, x)
    if mllm.config.llm.tie_embeddings and "llm.embed.table" in names:
        # What peft saves of a model that ties them; loaded, both have the one value.
        arrays[_HEAD] = next(
            x for name, x in arrays.items() if name.endswith("embed_tokens.weight")
        )
        settings["modules_to_save"].append("lm_head")
    return arrays, settings


def _no_place(what: str) -> UserError:
    return UserError(
        f"an adapter of peft has no place for {what} of this model; its own format (adapter) has"
    )


def _tensors(mllm: MLLM, mappings: Sequence[Any]) -> Arrays:
    parameters: Mapping[str, list[jax.Array]] = {
        name: [x.get_value() for x in layers] for name, layers in layered_parameters(mllm).items()
    }
    found: Arrays = {}
    for mapping in mappings:
        layers = [np.asarray(x, np.float32) for x in parameters[path_name(mapping.path)]]
        whole = layers[0] if layers[0].shape == mapping.shape else np.stack(layers)
        found |= mapping.to_hf(whole)
    return found
