"""How each of our methods looks in an adapter folder of `peft`: one `Format` per method.

Axis legend: D features in, F features out. Their matrices are `[out, in]`, ours `[in, out]`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.tuning.base import Method
from moresjax.tuning.methods.boft import BOFT
from moresjax.tuning.methods.dora import lengths
from moresjax.tuning.methods.ia3 import IA3, NO_INPUTS
from moresjax.tuning.methods.lora import LoRA
from moresjax.tuning.methods.oft import OFT
from moresjax.tuning.methods.vera import VeRA
from moresjax.weights.peft_lora import lora_keys
from moresjax.weights.peft_modules import Kernel, Module
from moresjax.weights.peft_virtual_tokens import VIRTUAL_TOKEN_METHODS

# The version whose conventions we write; older readers and writers of OFT differ.
PEFT_VERSION = "0.21.2"
FIRST_OFT = (0, 18)

# An array, and what makes the linear's kernel, to an array.
Convert = Callable[[np.ndarray, Kernel], np.ndarray]
# Settings of `adapter_config.json`, or keys of one of our methods.
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays in a file: the end of its name, and the conversion both ways.

    Conversions also take what makes the kernel `[D, F]` of the linear.
    """

    name: str
    to_peft: Convert = lambda x, kernel: x
    from_peft: Convert = lambda x, kernel: x


def _transposed(name: str) -> Leaf:
    return Leaf(name, lambda x, kernel: x.T, lambda x, kernel: x.T)


def _column(name: str) -> Leaf:
    return Leaf(name, lambda x, kernel: x[:, None], lambda x, kernel: x[:, 0])


_LORA = {"a": _transposed("lora_A.weight"), "b": _transposed("lora_B.weight")}
_MAGNITUDE = Leaf(
    "lora_magnitude_vector",
    lambda x, kernel: x + np.asarray(lengths(kernel())),
    lambda x, kernel: x - np.asarray(lengths(kernel())),
)


@dataclasses.dataclass(frozen=True)
class Format:
    """How `peft` writes one of our methods.

    Attributes:
      method: The name of the method here.
      peft_type: The name of the method in `peft`.
      leaves: The conversion of each parameter of a linear.
      config: Makes the settings of `adapter_config.json` from the method.
      keys: Makes the method's keys from those settings and the modules of a linear in its layers.
      shared: The conversion of arrays that all linears use.
    """

    method: str
    peft_type: str
    leaves: Mapping[str, Leaf]
    config: Callable[[Any], Settings]
    keys: Callable[[Mapping[str, Any], Sequence[Module]], Settings]
    shared: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)


def _lora_config(method: LoRA) -> Settings:
    return {
        "r": method.rank,
        "lora_alpha": method.scaled_by,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.name == "dora",
    }


def _oft_config(method: OFT) -> Settings:
    return {
        "r": 0,
        "oft_block_size": method.block_size,
        "use_cayley_neumann": method.cayley == "neumann",
        "num_cayley_neumann_terms": 5,
    }


def _oft_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> Settings:
    neumann = config.get("use_cayley_neumann", True)
    version = config.get("peft_version") or "0"
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if neumann and found < FIRST_OFT:
        raise UserError(
            f"the adapter's OFT is of peft {version}, whose Cayley-Neumann series is another one; "
            "peft 0.18 or newer is needed"
        )
    # The stored size, because peft silently changes one that does not divide the features.
    _, elements = _shape(modules[0], "oft_R.weight", 2)
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return {"block_size": size, "cayley": "neumann" if neumann else "exact"}


def _shape(module: Module, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a module's tensor, which must have this many axes."""
    shape = module.arrays[name].shape
    if len(shape) != axes:
        raise UserError(
            f"{module.tensors.source}: {name} of {module.site} must have {axes} axes, its shape is "
            f"{shape}"
        )
    return shape


def _ia3_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> Settings:
    """Which side of the linear is scaled, where it is not the usual one."""
    name = modules[0].site.split(".")[-1]
    on_input = _shape(modules[0], "ia3_l", 2)[0] == 1
    if on_input == (name in IA3().inputs.split(";")):
        return {}
    return {"inputs": name if on_input else NO_INPUTS}


def _boft_config(method: BOFT) -> Settings:
    return {
        "boft_block_size": method.block_size,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": method.factors,
        "boft_dropout": 0.0,
    }


def _boft_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> Settings:
    factors, _, size, _ = _shape(modules[0], "boft_R", 4)
    return {"block_size": size, "factors": factors}


def _vera_config(method: VeRA) -> Settings:
    return {
        "r": method.rank,
        "vera_dropout": method.dropout,
        "projection_prng_key": method.seed,
        "save_projection": True,
    }


def _vera_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> Settings:
    return {
        "rank": config.get("r", 256),
        "dropout": float(config.get("vera_dropout") or 0),
        "seed": config.get("projection_prng_key") or 0,
    }


FORMATS = (
    Format("lora", "LORA", _LORA, _lora_config, lora_keys),
    Format("dora", "LORA", _LORA | {"longer": _MAGNITUDE}, _lora_config, lora_keys),
    Format(
        "ia3",
        "IA3",
        {
            "scale_in": Leaf("ia3_l", lambda x, kernel: x[None], lambda x, kernel: x[0]),
            "scale_out": _column("ia3_l"),
        },
        lambda method: {},
        _ia3_keys,
    ),
    Format("oft", "OFT", {"skew": Leaf("oft_R.weight")}, _oft_config, _oft_keys),
    Format(
        "boft",
        "BOFT",
        {"matrix": Leaf("boft_R"), "scale": _column("boft_s")},
        _boft_config,
        _boft_keys,
    ),
    Format(
        "vera",
        "VERA",
        {"lambda_d": Leaf("vera_lambda_d"), "lambda_b": Leaf("vera_lambda_b")},
        _vera_config,
        _vera_keys,
        {"a": _transposed("base_model.vera_A"), "b": _transposed("base_model.vera_B")},
    ),
)
NORMS = "LN_TUNING"
PEFT_TYPES = tuple(dict.fromkeys((*(f.peft_type for f in FORMATS), NORMS)))


def format_of(method: Method) -> Format:
    """The format of one of our methods.

    Raises:
      UserError: when `peft` has none.
    """
    for form in FORMATS:
        if form.method == method.name:
            return form
    known = [*(form.method for form in FORMATS), "ln", *VIRTUAL_TOKEN_METHODS]
    raise choice_error("method for peft", method.name, known)


def read_format(config: Mapping[str, Any]) -> Format:
    """The format of a folder with this `adapter_config.json`."""
    name = "dora" if config.get("use_dora") else None
    return next(
        f for f in FORMATS if f.peft_type == config["peft_type"] and name in (None, f.method)
    )
