"""The editors that MRT's code (comeandcode/MRT, 8116969) saves, `rt_modules.bin`, in.

Axis legend: D features, r rank.

The file is a pickled dict from the names of modules to their state dicts. A module and the modules
inside it are all in it, so that a tensor stands there up to three times:

    PATH.vision_rt.L       block L of the vision encoder
    PATH.mm_rt             the connector
    PATH.prefix_lm_rt.L    block L of the LLM, the first tokens of the text
    PATH.suffix_lm_rt.L    and the last ones

Each has `rotate_layer.weight` (D x r), which is orthonormalised in the forward pass,
`learned_source.weight` (r x D) and `learned_source.bias` (r). That code computes `W h + b` and the
difference in bf16; here they are computed in fp32. The tokens are not in the file.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moresjax.core.errors import UserError
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.methods.mrt import GROUPS
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.sites import edit_dim, format_layers
from moresjax.tuning.spec import format_spec, parse_spec
from moresjax.weights.acting_layers import fill_layers
from moresjax.weights.adapter_files import check_finite
from moresjax.weights.files import pickle_error, read_pickles

NAME = "rt_modules.bin"
# Our name of a group, and where it acts, by that of the file.
_GROUPS = {"vision_rt": "visual", "mm_rt": "connector"}
_GROUPS |= {"prefix_lm_rt": "prefix", "suffix_lm_rt": "suffix"}
_SITES = {"visual": "vision.block.out", "connector": "connector.out"}
_TEXT = "llm.block.out"
_LEAVES = {"rotate_layer.weight": "rotate", "learned_source.weight": "weight"}
_LEAVES |= {"learned_source.bias": "bias"}
_TENSOR = re.compile(
    rf"(?:.*\.)?(?:(mm_rt)|({'|'.join(set(_GROUPS) - {'mm_rt'})})\.(\d+))\.(\w+\.\w+)"
)
_CACHE = "_weight_t_cache"  # what that code derives from other tensors

Editors = dict[str, dict[int, dict[str, np.ndarray]]]


def rt_modules_file(path: Path) -> Path | None:
    """The file of MRT's code that a path is or that lies in it; None without one."""
    for file in (path, path / NAME):
        if file.is_file() and file.suffix == ".bin":
            return file
    return None


def import_rt_modules(
    file: str | Path, mllm: MLLM, *, edits: str = "", allow_pickle: bool = False
) -> str:
    """Attaches the editors of MRT's code, replacing the attached tuning; returns its spec string.

    Args:
      file: The file `rt_modules.bin`.
      mllm: The model that they were trained on.
      edits: A spec that says which tokens each group of the file edits: `mrt` with its keys, or a
        `loreft` for each group, in the order visual, connector, prefix, suffix. Ranks and layers
        are the file's. Default: `mrt-code`.
      allow_pickle: Whether the pickle may be read (by torch, weights only).

    Raises:
      UserError: Pickles are not allowed, the file holds something else, or its tensors are not
        those of this model; the attached tuning is then as it was.
    """
    file = Path(file)
    if not allow_pickle:
        raise pickle_error(f"{file} is a pickle")
    editors = _read(file)
    names = [name for name in GROUPS if name in editors]
    chosen = parse_spec(edits or f"mrt-code:groups={';'.join(names)}")
    sites = [_SITES.get(name, _TEXT) for name in names]
    edited = [method for method in chosen if isinstance(method, LoReFT)]
    if [method.site for method in edited] != sites or len(edited) < len(chosen):
        raise UserError(
            f"{file} has the groups {', '.join(names)}, which are loreft at {', '.join(sites)}, "
            f"but {edits!r} says {format_spec(chosen)}"
        )
    methods = []
    for name, method in zip(names, edited, strict=True):
        ranks = {len(tensors["bias"]) for tensors in editors[name].values()}
        if len(ranks) != 1:
            raise UserError(f"{file}: the editors of a group must have one rank, got {ranks}")
        edit_dim(method, method.site, mllm.config)  # refuses a site that the model has not
        layers = format_layers(sorted(editors[name]), method.site, mllm.config)
        methods.append(dataclasses.replace(method, rank=ranks.pop(), layers=layers))
    tuning = Tuning(format_spec(methods), mllm.config)
    for (key, _), name, site in zip(tuning.methods, names, sites, strict=True):
        _fill(tuning, key, site, editors[name], file)
    mllm.tuning = tuning
    return tuning.spec


def _fill(
    tuning: Tuning, key: str, site: str, layers: Mapping[int, Mapping[str, np.ndarray]], file: Path
) -> None:
    """Sets the parameters of a group."""
    for leaf, variable in tuning.params[key][site].items():
        own = {layer: tensors[leaf] for layer, tensors in layers.items()}
        outside = site == _SITES["connector"]
        value = own[0] if outside else fill_layers(own, variable.shape[0])
        if value.shape != variable.shape:
            raise UserError(
                f"{file}: {leaf} at {site} has shape {value.shape}, the model needs "
                f"{variable.shape}"
            )
        variable.set_value(jnp.asarray(value))


def _read(file: Path) -> Editors:
    """By group and layer, our parameters; the connector's layer is 0."""
    found: Editors = {}
    for module, tensors in read_pickles(file).items():
        for name, tensor in tensors.items():
            if _CACHE in name:
                continue
            match = _TENSOR.fullmatch(f"{module}.{name}")
            if match is None or match[4] not in _LEAVES:
                raise UserError(f"{file} holds {module}.{name}, which is no editor of MRT")
            group = found.setdefault(_GROUPS[match[1] or match[2]], {})
            own, leaf = group.setdefault(int(match[3] or 0), {}), _LEAVES[match[4]]
            value = check_finite({name: np.asarray(tensor, np.float32)}, file)[name]
            if not np.array_equal(own.setdefault(leaf, value), value):
                raise UserError(f"{file} holds {module}.{name} twice, with different values")
    if not found:
        raise UserError(f"{file} holds no editors of MRT")
    for name, group in found.items():
        for layer, own in group.items():
            if missing := [leaf for leaf, ours in _LEAVES.items() if ours not in own]:
                raise UserError(f"{file}: the {name} editor of layer {layer} has no {missing[0]}")
    return found
