"""LoRA in an adapter folder of `peft`: ranks and scales of every module, and changed base weights.

Axis legend: D features in, F features out, r rank.

Some initialisations take a start A0, B0 out of the base weights, which are then W - s B0 A0 for
good. Where A0 and B0 follow from W and the rank (PiSSA, OLoRA) the adapter is read as the LoRA of
twice the rank on the unchanged base that `peft`'s own conversion makes of it: [B, -B0] [A; A0].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError, choice_error
from moresjax.core.patterns import full_match
from moresjax.weights.peft_modules import Module

A, B = "lora_A.weight", "lora_B.weight"
# Initialisations that leave the base weights as they are, and those that can be computed again.
PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica")
COMPUTED = ("pissa", "olora")
# The others, with what would be needed to know the base weights that the adapter was trained on.
LOST = {
    "pissa_niter_": "random numbers",
    "corda": "statistics of data",
    "lora_ga": "gradients on data",
    "loftq": "a quantization",
}
Factors = tuple[Float[np.ndarray, "r D"], Float[np.ndarray, "F r"], float]


def lora_keys(config: Mapping[str, Any], modules: Sequence[Module]) -> dict[str, Any]:
    """The keys of one of our methods for all layers of a linear.

    Modules get tensors of one rank and one scale: zeros fill up the smaller ranks, and where scales
    differ B has the rest of its own.

    Args:
      config: The content of `adapter_config.json`.
      modules: The linear in its layers.

    Raises:
      UserError: when the base weights that the adapter was trained on cannot be known.
    """
    stabilised = bool(config.get("use_rslora"))
    factors = [_factors(config, module) for module in modules]
    scales = [alpha / _root(len(a), stabilised) for a, _, alpha in factors]
    rank = max(len(a) for a, _, _ in factors)
    if len({(len(a), alpha) for a, _, alpha in factors}) == 1:
        alpha = factors[0][2]
    else:
        alpha = max(scales, key=abs) * _root(rank, stabilised)
    scale = alpha / _root(rank, stabilised)
    for module, (a, b, _), own in zip(modules, factors, scales, strict=True):
        more = rank - len(a)
        module.arrays[A] = np.pad(a, ((0, more), (0, 0)))
        rest = np.float32(own / scale) if own != scale else 1
        module.arrays[B] = rest * np.pad(b, ((0, 0), (0, more)))
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": float(config.get("lora_dropout") or 0),
        "rslora": stabilised,
    }


def check_start(config: Mapping[str, Any], source: str) -> None:
    """Refuses adapters whose base weights cannot be known.

    Raises:
      UserError: that says which initialisation changed them.
    """
    start = _start(config)
    for name, needed in LOST.items():
        if isinstance(start, str) and start.startswith(name):
            raise UserError(
                f"{source}: init_lora_weights={start!r} has changed the base weights by {needed} "
                "that the folder does not hold; save the adapter for the unchanged base, in peft "
                "with path_initial_model_for_weight_conversion"
            )
    if start not in (*PLAIN, *COMPUTED):
        raise choice_error(f"init_lora_weights in {source}", start, (*PLAIN, *COMPUTED))


def _start(config: Mapping[str, Any]) -> Any:
    start = config.get("init_lora_weights", True)
    return start.lower() if isinstance(start, str) else bool(start)


def _factors(config: Mapping[str, Any], module: Module) -> Factors:
    """A, B and alpha of a module on the unchanged base."""
    rank = int(_of_module(config.get("rank_pattern"), module, config.get("r", 8)))
    alpha = float(_of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    a, b = module.take(A, (rank, module.d_in)), module.take(B, (module.d_out, rank))
    start, stabilised = _start(config), bool(config.get("use_rslora"))
    if start not in COMPUTED:
        return a, b, alpha
    scale, weight = alpha / _root(rank, stabilised), module.kernel().T
    if start == "olora":
        q, r = np.linalg.qr(weight)
        first_b, first_a = q[:, :rank], r[:rank]
    else:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        if not scale:
            raise UserError(f"{module.tensors.source}: PiSSA with lora_alpha=0 divides by zero")
        first_b, first_a = u[:, :rank] * (s[:rank] / scale), v[:rank]
    double = _root(2 * rank, stabilised) / _root(rank, stabilised)
    return np.concatenate([a, first_a]), np.concatenate([b, -first_b], axis=1), alpha * double


def _of_module(patterns: Mapping[str, Any] | None, module: Module, default: Any) -> Any:
    """The value for a module: that of the first pattern that matches the end of its path."""
    for pattern, value in (patterns or {}).items():
        if full_match(rf"(.*\.)?({pattern})", module.file_name, module.tensors.source):
            return value
    return default


def _root(rank: int, stabilised: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if stabilised else float(rank)
