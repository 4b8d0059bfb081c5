"""Folders of `pyreft` (0.1, with pyvene 0.1), in and out: `config.json` and one file per edit.

Axis legend: D hidden size, r rank.

`config.json` lists for every edit its layer, component, unit, number of units and rank; the file
`intkey_KEY.bin` is a pickled state dict of `weight` (r x D), `bias` (r) and `rotate_layer` (D x r).
That last one is the orthonormal R itself, not what is trained behind it: pyreft makes a new
parametrisation around it and stops unless it gets the same matrix back, and it loses R when its
training goes on from there. We write Q of the QR decomposition of our parameter in double
precision, rounded once; read back, an orthonormal matrix is its own Q. Neither the tokens that are
edited nor dropout are in the folder. pyreft takes `weight` and `bias` in bf16 whatever is written.

LLaVA Steering's code saves its MoReS the same way (see `moresjax.weights.steering`). A connector
that trained too is in a file of ours, `connector.safetensors`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import read_object, write_json
from moresjax.core.parameter_names import named_parameters
from moresjax.core.reading import read_json
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM
from moresjax.tuning.attach import Tuning
from moresjax.tuning.methods.mores import MoReS
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.sites import format_layers
from moresjax.tuning.spec import format_spec, parse_spec
from moresjax.weights import steering
from moresjax.weights.acting_layers import fill_layers
from moresjax.weights.adapter_files import PyreftConfig, check_finite, load_tensors
from moresjax.weights.families.keys import COMMON_KEYS
from moresjax.weights.files import pickle_error, read_pickle
from moresjax.weights.tensor_mapping import Tensor

METHOD_NAMES = ("loreft", "mores")
SITE, COMPONENT = "llm.block.out", "block_output"
# What saves the same three tensors, and our method of that name.
LOREFT = "pyreft.interventions.LoreftIntervention"
_TYPES: dict[str, type[LoReFT | MoReS]] = {LOREFT: LoReFT, steering.MORES: MoReS}
CONNECTOR = "connector.safetensors"
# How many fields an entry of `representations` has after layer, component, unit, units and rank.
_UNUSED_FIELDS = 9
# Every key of config.json, whose class is one of transformers.
KEYS = COMMON_KEYS | ConfigKeys(
    implemented=("representations", "intervention_types", "intervention_constant_sources"),
    choices={"mode": ("parallel",)},
    irrelevant={
        "intervention_dimensions": "the tensors' shapes are checked",
        "sorted_keys": "the files are named after the entries of representations",
        "model_type": "the class of the model, whose shapes are checked",
        "dtype": "of the model; the tensors are read as they are",
        "torch_dtype": "of the model; the tensors are read as they are",
    },
)
# The fields of an entry of `representations` with a name in every release, in this order; of those
# after them none may be set.
_FIELDS = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
# The largest difference between R^T R and the identity. Rounding to bf16 stays below it; a matrix
# that was never orthonormal is far above.
_TOLERANCE = 0.05
# The block's output by its path, as in `model.layers[3].output`.
_PATH = re.compile(r"(?:\w+\.)*(?:layers|h)\[(\d+)\]\.output")


def export_pyreft(
    mllm: MLLM, folder: str | Path, *, connector: bool = False, kind: str = LOREFT
) -> Path:
    """Writes the attached `loreft` or `mores` edits as a folder of pyreft; returns the folder.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> folder = export_pyreft(tiny_model("mores:layers=0"), tempfile.mkdtemp())
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin']

    Several methods become several edits of a layer, in order (`#0`, `#1`).

    Args:
      mllm: The model.
      folder: The folder to write.
      connector: Whether to write the connector too, for `import_pyreft`.
      kind: The type of the edits that the folder names.

    Raises:
      UserError: when another method is attached, or torch is not installed.
    """
    tuning, folder = mllm.tuning, Path(folder)
    tuning.check_single("a folder of pyreft")
    if not tuning.methods:
        raise UserError(f"tuning {tuning.spec!r} has no edits to write for pyreft")
    methods: dict[str, LoReFT | MoReS] = {}
    for name, method in tuning.methods:
        if isinstance(method, LoReFT | MoReS) and method.site == SITE:
            methods[name] = method
        else:
            raise UserError(
                f"pyreft's layout holds {' and '.join(METHOD_NAMES)} at {SITE} here, the model's "
                f"tuning is {tuning.spec!r}"
            )
    try:
        import torch
    except ImportError:
        raise UserError("writing a folder of pyreft needs torch, which is not installed") from None
    entries, keys, files = [], [], {}
    for name, method in methods.items():
        params = {leaf: np.asarray(x[...]) for leaf, x in tuning.params[name][SITE].items()}
        for layer in np.flatnonzero(tuning.layer_masks[name][SITE][...]).tolist():
            first = [layer, COMPONENT, "pos", 1, method.rank]
            entries.append(first + [None] * _UNUSED_FIELDS)
            stem = _stem(layer, COMPONENT, "pos", 1)
            keys.append(f"{stem}#{sum(key.startswith(f'{stem}#') for key in keys)}")
            files[keys[-1]] = {
                "weight": torch.tensor(params["weight"][layer]),
                "bias": torch.tensor(params["bias"][layer]),
                "rotate_layer": torch.tensor(_orthonormal(params["rotate"][layer])),
            }
    folder.mkdir(parents=True, exist_ok=True)
    for key, tensors in files.items():
        torch.save(tensors, folder / f"intkey_{key}.bin")
    config = {
        "representations": entries,
        "intervention_types": [f"<class '{kind}'>"] * len(keys),
        "intervention_dimensions": [mllm.config.llm.hidden_size] * len(keys),
        "intervention_constant_sources": [True] * len(keys),
        "mode": "parallel",
        "sorted_keys": keys,
    }
    write_json(folder / "config.json", config)
    if connector:
        values = {n: np.asarray(x.get_value()) for n, x in named_parameters(mllm).items()}
        own = {n: x for n, x in values.items() if n.startswith("connector.")}
        save_file(own, folder / CONNECTOR)
    return folder


def pyreft_folder(folder: Path) -> Path | None:
    """Where the edits are that pyreft or LLaVA Steering saved in a folder; None without any."""
    for place in (folder, folder / steering.PLACE):
        file = place / "config.json"
        if file.is_file() and "representations" in read_object(file):
            return place
    return None


def import_pyreft(
    folder: str | Path,
    mllm: MLLM,
    *,
    edits: str = "",
    allow_pickle: bool = False,
) -> str:
    """Attaches a folder of pyreft, replacing the attached tuning; returns its spec string.

    >>> import tempfile
    >>> from moresjax.testing import tiny_model
    >>> folder = export_pyreft(tiny_model("mores:rank=2,positions=image:f4"), tempfile.mkdtemp())
    >>> import_pyreft(folder, tiny_model(), edits="mores:positions=image:f4", allow_pickle=True)
    'mores:positions=image:f4,rank=2'

    Args:
      folder: The folder of LoReFT or MoReS edits of block outputs, or a run of LLaVA Steering.
      mllm: The model that they were trained on.
      edits: A spec of `loreft` or `mores` methods that says which tokens each edit of a layer
        changes, because the folder does not: `mores:positions=image`, or for two edits
        `loreft:positions=prompt:f2/loreft:positions=prompt:l2`. Ranks and layers are the folder's.
        Default: `mores` with the tokens that LLaVA Steering noted, or its own; `loreft` with its
        own, and for two edits the first four and the last four tokens of the prompt.
      allow_pickle: Whether pickles may be read (by torch, weights only); pyreft writes nothing
        else.

    Raises:
      UserError: when pickles are not allowed, the folder is not one of LoReFT, or its tensors are
        not those of this model; the attached tuning is then as it was.
    """
    folder = pyreft_folder(Path(folder)) or Path(folder)
    chosen = parse_spec(edits) if edits else ()
    for method in chosen:
        if not isinstance(method, LoReFT | MoReS):
            raise choice_error("method for a folder of pyreft", method.name, METHOD_NAMES)
    method, groups = _read(folder, allow_pickle)
    if not edits:
        ranks = {len(tensors["bias"]) for layers in groups for tensors in layers.values()}
        chosen = _usual(method, folder, len(groups), ranks)
    if len(chosen) != len(groups):
        raise UserError(
            f"{folder} has {len(groups)} edits per layer, but {edits!r} says it of {len(chosen)}"
        )
    llm, methods = mllm.config.llm, []
    for method, layers in zip(chosen, groups, strict=True):
        ranks = {len(tensors["bias"]) for tensors in layers.values()}
        if len(ranks) != 1:
            raise UserError(f"{folder}: the layers of an edit must have one rank, got {ranks}")
        acting = format_layers(sorted(layers), SITE, mllm.config)
        methods.append(dataclasses.replace(method, rank=ranks.pop(), layers=acting))
    tuning = Tuning(format_spec(methods), mllm.config)
    for (name, _), layers in zip(tuning.methods, groups, strict=True):
        for leaf, variable in tuning.params[name][SITE].items():
            own = {layer: tensors[leaf] for layer, tensors in layers.items()}
            stacked = fill_layers(own, llm.num_layers)
            if stacked.shape != variable.shape:
                raise UserError(
                    f"{folder}: {leaf} of an edit has shape {stacked.shape[1:]}, the model needs "
                    f"{variable.shape[1:]}"
                )
            variable.set_value(jnp.asarray(stacked))
    if (folder / CONNECTOR).is_file():
        own = load_tensors(folder / CONNECTOR)
        names = {n for n in named_parameters(mllm) if n.startswith("connector.")}
        if names != set(own):
            raise UserError(f"{folder / CONNECTOR} is not this model's connector")
        set_params(mllm, own, str(folder / CONNECTOR))
    mllm.tuning = tuning
    return tuning.spec


def _usual(
    kind: type[LoReFT | MoReS], folder: Path, count: int, ranks: set[int]
) -> list[LoReFT | MoReS]:
    """Edits at the tokens that a folder notes, or else at those that are usual."""
    if kind is MoReS:
        dropout = steering.noted_dropout(folder, ranks)
        noted = steering.noted_positions(folder, count)
        return [MoReS(positions=p, dropout=dropout) for p in noted]
    pair = ("prompt:f4+l0", "prompt:f0+l4") if count == 2 else ()
    return [LoReFT(positions=p) for p in pair] or [LoReFT()] * count


def _read(
    folder: Path, allow_pickle: bool
) -> tuple[type[LoReFT | MoReS], list[dict[int, dict[str, np.ndarray]]]]:
    """The kind of all edits, and our parameters of each by its number (`#0`, `#1`) and layer."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a folder of pyreft: it has no config.json")
    config = read_json(folder / "config.json", PyreftConfig)
    if not config.get("representations"):
        raise UserError(f"{folder} is not a folder of pyreft: config.json has no representations")
    sources = config.get("intervention_constant_sources")
    if sources is not None and not all([sources] if isinstance(sources, bool) else sources):
        raise UserError(f"{folder} has edits with a source, which are not supported")
    KEYS.check(config, str(folder / "config.json"))
    kinds = config.get("intervention_types", ())
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    named = {kind: kind.removeprefix("<class '").removesuffix("'>") for kind in kinds}
    for kind, name in named.items():
        if name not in _TYPES or len(kinds) > 1:
            raise choice_error(f"intervention type in {folder}", kind, [*_TYPES])
    method = _TYPES[next(iter(named.values()), LOREFT)]
    if not allow_pickle:
        raise pickle_error(f"{folder} has only pickled weights")
    files = {_plain(file.stem): file for file in folder.glob("intkey_*.bin")}
    groups: list[dict[int, dict[str, np.ndarray]]] = []
    used: list[str] = []
    for entry in config["representations"]:
        layer, stem, rank = _place(entry, folder)
        key = _plain(f"intkey_{stem}#{used.count(stem)}")
        used.append(stem)
        if key not in files:
            raise UserError(f"{folder} lacks the file {key}.bin")
        number = sum(layer in edits for edits in groups)
        if number == len(groups):
            groups.append({})
        tensors = _parameters(read_pickle(files[key]), files[key])
        if rank not in (None, len(tensors["bias"])):
            raise UserError(f"{files[key]} is of rank {len(tensors['bias'])}, not of {rank}")
        groups[number][layer] = tensors
    return method, groups


def _place(entry: Mapping[str, Any] | Sequence[Any], folder: Path) -> tuple[int, str, int | None]:
    """Layer, key and rank of an entry of `representations`; the key is without the number."""
    if isinstance(entry, Mapping):
        fields: dict[str, Any] = dict(entry)
    else:
        names = [*_FIELDS, *(str(n) for n in range(len(_FIELDS) + 1, len(entry) + 1))]
        fields = dict(zip(names, entry, strict=False))
    if missing := [field for field in _FIELDS[:4] if field not in fields]:
        raise UserError(f"{folder}: an entry of representations has no {missing[0]}")
    for key, value in fields.items():
        if key not in _FIELDS and value not in (None, [None]):
            raise UserError(f"{folder}: representations with field {key} = {value!r}")
    values: list[Any] = [fields.get(field) for field in _FIELDS]
    layer, component, unit, units, rank = values
    if not isinstance(component, str) or type(rank) not in (int, type(None)):
        raise UserError(f"{folder}: an entry of representations has {component!r}, rank {rank!r}")
    if path := _PATH.fullmatch(component):
        layer = path[1]
    elif component != COMPONENT:
        raise choice_error(
            f"component in {folder}", component, (COMPONENT, "PATH.layers[N].output")
        )
    if unit != "pos" or units != 1:
        raise UserError(f"{folder}: edits must be of single positions, got {units} of {unit!r}")
    if type(layer) is not int and not (isinstance(layer, str) and layer.isdecimal()):
        raise UserError(f"{folder}: an entry of representations has the layer {layer!r}")
    return int(layer), _stem(*values[:4]), rank


def _stem(layer: int, component: str, unit: str, units: int) -> str:
    place = f"comp_{component}" if "." in component else f"layer_{layer}_comp_{component}"
    return f"{place}_unit_{unit}_nunit_{units}"


def _plain(stem: str) -> str:
    """A file's stem in one spelling: older releases had dots, and `repr` for `comp`."""
    return re.sub(r"_repr_", "_comp_", stem.replace(".", "_"))


def _parameters(tensors: Mapping[str, Tensor], file: Path) -> dict[str, np.ndarray]:
    names = ("bias", "rotate_layer", "weight")
    if sorted(tensors) != [*names]:
        raise UserError(f"{file} must hold {', '.join(names)}, it holds {', '.join(tensors)}")
    bias, rotate, weight = (np.asarray(tensors[name], np.float32) for name in names)
    check_finite({"bias": bias, "rotate_layer": rotate, "weight": weight}, file)
    if (bias.ndim, rotate.ndim, weight.ndim) != (1, 2, 2):
        raise UserError(f"{file} must hold a vector `bias` and matrices, the rest")
    gram = rotate.T.astype(np.float64) @ rotate
    if np.abs(gram - np.eye(len(gram))).max() > _TOLERANCE:
        raise UserError(f"{file}: rotate_layer is not orthonormal")
    return {"rotate": rotate, "weight": weight, "bias": bias}


def _orthonormal(raw: Float[np.ndarray, "D r"]) -> Float[np.ndarray, "D r"]:
    q, r = np.linalg.qr(raw.astype(np.float64))
    return (q * np.where(np.diagonal(r) < 0, -1, 1)).astype(np.float32)
