"""Adapter folders of Hugging Face `peft`, in and out.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. What it tunes of the LLM, the
vision encoder and the connector becomes one or several methods here: linears with the same rank,
scale and layers share one. Target modules are written as a regex over whole paths.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import new_file
from moresjax.core.json_files import write_json
from moresjax.core.parameter_names import layered_parameters, matches
from moresjax.core.reading import read_json
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import METHODS, Method, VirtualTokens
from moresjax.tuning.merge import dense_at
from moresjax.tuning.methods.ln import NormTuning
from moresjax.tuning.sites import format_layers, num_layers
from moresjax.tuning.spec import format_spec
from moresjax.weights.adapter_files import PeftConfig, load_tensors
from moresjax.weights.peft_base import NORM_COPY, base_methods, read_base, write_base
from moresjax.weights.peft_formats import (
    NORMS,
    PEFT_TYPES,
    PEFT_VERSION,
    Format,
    format_of,
    read_format,
)
from moresjax.weights.peft_keys import KEYS
from moresjax.weights.peft_lora import check_start
from moresjax.weights.peft_modules import Modules, Tensors, tuned_modules
from moresjax.weights.peft_names import PREFIX, linear_names, pattern, runs
from moresjax.weights.peft_virtual_tokens import (
    TENSOR,
    VIRTUAL_TOKEN_METHODS,
    VIRTUAL_TOKEN_TYPES,
    virtual_tokens_from_peft,
    virtual_tokens_to_peft,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]


def export_peft(mllm: MLLM, folder: str | Path, *, also_train: Sequence[str] = ()) -> Path:
    """Writes the attached methods as an adapter folder of `peft`; returns the folder.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> model = tiny_model("lora:rank=2")
    >>> folder = export_peft(model, tempfile.mkdtemp(), also_train=["connector"])
    >>> sorted(path.name for path in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    Args:
      mllm: A tuned model.
      folder: The folder to write.
      also_train: Paths of other parameters that trained, such as `connector`; they become
        `modules_to_save`, or `bias`.

    Raises:
      UserError: when `peft` has no such method, or cannot hold the combination.
    """
    tuning, folder = mllm.tuning, Path(folder)
    tuning.check_single("a folder of peft")
    methods = {key: method for key, method in tuning.methods if not method.trains}
    own = [m for _, m in tuning.methods if m.trains]
    names = _trained(mllm, (*also_train, *(path for method in own for path in method.trains)))
    first = next(iter(methods.values()), None)
    if first is None and not any(isinstance(method, NormTuning) for method in own):
        raise UserError(f"peft holds one method, the model's tuning is {tuning.spec!r}")
    if isinstance(first, VirtualTokens) and first.name in VIRTUAL_TOKEN_METHODS:
        if names or len(methods) > 1:
            raise UserError(f"an adapter of peft with {first.name} holds nothing else")
        arrays, config = virtual_tokens_to_peft(mllm, first)
    elif first is None:
        arrays, config = _norms_to_peft(mllm, names)
    else:
        arrays, config = _linears_to_peft(mllm, methods)
        whole, settings = write_base(mllm, names, _adapted(mllm, methods))
        arrays, config = arrays | whole, config | settings
    if "bias" in config and "bias" not in KEYS[config["peft_type"]].listed:
        raise UserError(f"an adapter of peft with {config['peft_type']} cannot hold biases")
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": PEFT_VERSION}
    folder.mkdir(parents=True, exist_ok=True)
    named = {_file_name(n): np.ascontiguousarray(x, np.float32) for n, x in arrays.items()}
    with new_file(folder / TENSORS) as file:
        save_file(named, file, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    return folder


def _trained(mllm: MLLM, patterns: Sequence[str]) -> set[str]:
    """Names of the model's own parameters that patterns name, of what runs."""
    return {
        name
        for name in layered_parameters(mllm)
        if not name.startswith("tuning.")
        and runs(name, mllm.config)
        and any(matches(name, each) for each in patterns)
    }


def _linears_to_peft(mllm: MLLM, methods: Mapping[str, Method]) -> tuple[Arrays, Settings]:
    tuning = mllm.tuning
    forms = [format_of(method) for method in methods.values()]
    configs = [form.config(method) for form, method in zip(forms, methods.values(), strict=True)]
    free = ("r", "lora_alpha") if forms[0].peft_type == "LORA" else ()
    fixed = [{k: x for k, x in config.items() if k not in free} for config in configs]
    sites = [site for key in methods for site in tuning.params[key]]
    if any(form != forms[0] for form in forms) or len(set(sites)) < len(sites):
        raise UserError(f"peft holds one method, the model's tuning is {tuning.spec!r}")
    if any(each != fixed[0] for each in fixed) or (forms[0].shared and len(forms) > 1):
        raise UserError(f"peft has the same settings for all linears, not {tuning.spec!r}")
    arrays: Arrays = {}
    config = {"peft_type": forms[0].peft_type, **configs[0], "target_modules": ""}
    patterns: list[str] = []
    on_input: list[str] = []
    for (key, _), form, own in zip(methods.items(), forms, configs, strict=True):
        others = {k: own[k] for k in free if own[k] != configs[0][k]}
        for site, variables in tuning.params[key].items():
            tensors, modules = _site_to_peft(mllm, key, site, form)
            arrays |= tensors
            patterns.append(modules)
            on_input += [modules] if "scale_in" in variables else []
            if others:
                config.setdefault("rank_pattern", {})[modules] = own["r"]
                config.setdefault("alpha_pattern", {})[modules] = own["lora_alpha"]
        for leaf, x in tuning.common(key).items():
            arrays[form.shared[leaf].name] = form.shared[leaf].to_peft(np.asarray(x), _no_kernel)
    config["target_modules"] = "|".join(patterns)
    if forms[0].peft_type == "IA3":
        config["feedforward_modules"] = "|".join(on_input) or []
    return arrays, config


def _site_to_peft(mllm: MLLM, key: str, site: str, form: Format) -> tuple[Arrays, str]:
    """The tensors of a method at a site, and a regex of the modules that they belong to."""
    names, mask = linear_names(mllm.config), mllm.tuning.layer_mask(key, site)
    if site not in names:
        raise UserError(f"an adapter of peft has no place for {site} of this model")
    layers = [0] if mask is None else np.flatnonzero(mask).tolist()
    arrays: Arrays = {}
    for leaf, variable in mllm.tuning.params[key][site].items():
        values = np.asarray(variable[...])
        values = values[None] if mask is None else values
        for layer in layers:
            kernel = functools.partial(dense_at, mllm, site, layer)
            value = form.leaves[leaf].to_peft(values[layer], kernel)
            arrays[f"{names[site].format(layer)}.{form.leaves[leaf].name}"] = value
    # Of the vision encoder there are more layers than ours, which never run.
    every = mask is None or (len(layers) == len(mask) and not site.startswith("vision."))
    return arrays, pattern(names[site], None if every else layers)


def _adapted(mllm: MLLM, methods: Mapping[str, Method]) -> set[str]:
    """The modules that methods act on, in all layers."""
    names = linear_names(mllm.config)
    return {
        names[site].format(layer)
        for key in methods
        for site in mllm.tuning.params[key]
        for layer in range(num_layers(site, mllm.config) or 1)
    }


def _norms_to_peft(mllm: MLLM, names: set[str]) -> tuple[Arrays, Settings]:
    """LN tuning, with what else trained as modules to save."""
    norms = {name for name in names if re.fullmatch(r".*norm\.(scale|bias)", name)}
    arrays, saved = write_base(mllm, norms, ())
    modules = saved.get("modules_to_save", [])
    renamed = {
        re.sub(r"\.(\w+)$", rf".{NORM_COPY}.\1", name): x
        for name, x in arrays.items()
        if name.rpartition(".")[0] in modules
    }
    rest, settings = write_base(mllm, names - norms, ())
    # Where a whole stack of layers is meant, the numbers say no more than \d+ would.
    targets = sorted({pattern(re.sub(r"\.\d+\.", ".{}.", module)) for module in modules})
    return renamed | rest, {"peft_type": NORMS, "target_modules": "|".join(targets)} | settings


def import_peft(folder: str | Path, mllm: MLLM) -> str:
    """Attaches an adapter folder of `peft`, replacing the attached tuning; returns its spec string.

    What the folder has of the model's own parameters (norms, modules to save, biases) replaces
    them, and `ln` and `partial` stand for it in the spec.

    Raises:
      UserError: when the folder is not a safetensors adapter, its method or one of its settings
        is not supported, or its tensors are not those of this model; the message lists them.
    """
    folder = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not an adapter of peft: it has no {file}")
    config = read_json(folder / CONFIG, PeftConfig)
    stored = load_tensors(folder / TENSORS)
    types, kind = (*PEFT_TYPES, *VIRTUAL_TOKEN_TYPES), config["peft_type"]
    if kind not in types:
        raise choice_error("peft_type", kind, types)
    KEYS[kind].check(config, f"{kind} in {folder / CONFIG}")
    return attach_peft(mllm, config, stored, str(folder))


def attach_peft(
    mllm: MLLM, config: Mapping[str, Any], stored: Mapping[str, np.ndarray], source: str
) -> str:
    """Attaches an adapter of `peft` that has been read; see `import_peft`.

    Args:
      mllm: The model, changed in place.
      config: What `adapter_config.json` says.
      stored: The tensors by their names in a file.
      source: Their origin, for messages.

    Raises:
      UserError: when a setting is not supported, or the tensors are not those of this model.
    """
    kind = config["peft_type"]
    tensors = Tensors(stored, mllm.config, source)
    base: Arrays = {}
    if kind in VIRTUAL_TOKEN_TYPES:
        tensor = tensors.take(TENSOR)
        tensors.finish()
        tuning = virtual_tokens_from_peft(mllm.config, config, tensor, source)
    else:
        modules, form = {}, None
        if kind != NORMS:
            if kind == "LORA":
                check_start(config, source)
            form = read_format(config)
            ends = {leaf.name for leaf in form.leaves.values()}
            modules = tuned_modules(mllm, tensors, ends, config)
            if not modules and not tensors.missing:
                held = ", ".join([*tensors.left][:8])
                raise UserError(f"{source} holds no {form.method} of this model, only: {held}")
        base = read_base(mllm, config, tensors)
        beside = base_methods(mllm.config, base, f"{source}, as a tuning of this model,")
        tuning = _linears_from_peft(mllm, form, config, tensors, modules, beside)
        tensors.finish()
    set_params(mllm, {name: jnp.asarray(x) for name, x in base.items()}, source)
    mllm.tuning = tuning
    return tuning.spec


def _linears_from_peft(
    mllm: MLLM,
    form: Format | None,
    config: Mapping[str, Any],
    tensors: Tensors,
    modules: Modules,
    beside: Sequence[Method],
) -> Tuning:
    """The tuning of a file's linears, with methods beside them that have no parameters."""
    if form is None:
        return Tuning(format_spec(beside), mllm.config)
    groups: dict[tuple, list[str]] = {}
    for site, own in modules.items():
        keys = form.keys(config, [*own.values()])
        layers = format_layers(own, site, mllm.config)
        groups.setdefault((*keys.items(), ("layers", layers)), []).append(site)
    if form.shared and len(groups) > 1:
        acts = {site: [*own] for site, own in modules.items()}
        raise UserError(
            f"{tensors.source}: the adapter must act on the same layers at every linear, it acts "
            f"on {acts}"
        )
    methods = [
        METHODS[form.method](**(dict(keys) | {"targets": _targets(mllm.config, sites)}))
        for keys, sites in groups.items()
    ]
    tuning = Tuning(format_spec([*methods, *beside]), mllm.config)
    tuning.initialize()
    for (key, _), sites in zip(tuning.methods, groups.values(), strict=False):
        for site in sites:
            for leaf, variable in tuning.params[key][site].items():
                values = np.array(variable[...])
                each = values if num_layers(site, mllm.config) else values[None]
                for layer, module in modules[site].items():
                    convert = form.leaves[leaf]
                    shape = convert.to_peft(each[layer], module.kernel).shape
                    x = module.take(convert.name, shape)
                    each[layer] = convert.from_peft(x, module.kernel)
                variable[...] = jnp.asarray(values)
        for leaf, x in tuning.common(key).items():
            # Without them in the file, the seed has made the ones that peft would make.
            if form.shared[leaf].name in tensors.left:
                stored = tensors.take(form.shared[leaf].name, x.shape[::-1])
                tuning.shared[key][leaf][...] = form.shared[leaf].from_peft(stored, _no_kernel)
    return tuning


def _targets(config: MLLMConfig, sites: Sequence[str]) -> str:
    """What `targets=` calls these sites."""
    names = [site.replace(".block", "").removeprefix("llm.") for site in sites]
    every = {"": [*config.llm.linears()]}
    if isinstance(config.vision, VisionConfig):
        every["vision."] = [f"vision.{name}" for name in config.vision.linears()]
    every["connector."] = [f"connector.{name}" for name in config.connector_linears()]
    for tower, linears in every.items():
        if linears and {*linears} <= {*names}:
            start = names.index(linears[0])
            names = [name for name in names if name not in linears]
            names.insert(start, f"{tower}all")
    return ";".join(names)


def _file_name(name: str) -> str:
    whole = name.startswith("base_model.") or name == TENSOR
    return name if whole else f"{PREFIX}{name}"


def _no_kernel() -> np.ndarray:
    raise AssertionError("arrays that all linears share have no kernel")
