"""Several trained tunings held at once, one chosen for every row of a batch.

Axis legend: B rows, L layers, A adapters.

Their parameters are stacked into one `Tuning`: leaves are `[L, A, ...]` at layered sites and
`[A, ...]` elsewhere, and layer masks `[L, A]` or `[A]`. The last of the A is the base model: an
adapter that is switched off everywhere, which is where the number -1 leads.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.tuning.attach import LayerMask, Tuning
from moresjax.tuning.base import Edit, Method, WeightDelta
from moresjax.tuning.sites import num_layers

BASE = "base"


def stack_adapters(tunings: Mapping[str, Tuning]) -> Tuning:
    """One tuning from which `Batch.adapter` chooses for every row, by the order of `tunings`.

    Args:
      tunings: Tunings by name. They have the same spec, up to the layers they act on and what they
        were given.

    Raises:
      UserError: when the tunings differ in their methods, or a method cannot be chosen per row.
    """
    if not tunings or BASE in tunings:
        raise UserError(f"adapters need names other than {BASE!r}, got {[*tunings]}")
    (first_name, first), *others = tunings.items()
    for name, other in others:
        if _trained(other) != _trained(first):
            raise UserError(
                f"adapters of one model differ in layers only: {first_name!r} is {first.spec}, "
                f"{name!r} is {other.spec}"
            )
    for key, method in first.methods:
        if not isinstance(method, Edit | WeightDelta) or getattr(method, "sees_tokens", False):
            raise UserError(f"{method.name} cannot be chosen per row")
        for leaf, x in first.common(key).items():
            if any(not np.array_equal(x, other.common(key)[leaf]) for _, other in others):
                raise UserError(f"the adapters bring different frozen arrays {leaf!r} of {key}")
    stacked = nnx.clone(first)
    stacked.adapters = tuple(tunings)
    for key, sites in first.params.items():
        for site, params in sites.items():
            axis = 1 if num_layers(site, first.config) else 0
            for leaf, variable in params.items():
                # The base's parameters are never used; a copy of the first ones will do.
                values = [t.params[key][site][leaf][...] for t in (*tunings.values(), first)]
                stacked.params[key][site][leaf] = type(variable)(jnp.stack(values, axis))
            masks = [tuning.layer_mask(key, site) for tuning in tunings.values()]
            masks = [jnp.asarray(True) if mask is None else mask for mask in masks]
            on = jnp.stack([*masks, jnp.zeros_like(masks[0])], axis)
            stacked.layer_masks[key][site] = LayerMask(on)
    return stacked


def _trained(tuning: Tuning) -> list[tuple[str, Method]]:
    return [(key, method.trained) for key, method in tuning.methods]


def adapter_ids(
    tuning: Tuning, names: Sequence[str | None] | None, rows: int
) -> Int[np.ndarray, " B"] | None:
    """The numbers that `Batch.adapter` takes, from the names of the rows' adapters.

    Args:
      tuning: What is attached to the model.
      names: One name per row; None and `base` stand for the base model. Without names all rows get
        the base model.
      rows: The number of rows.

    Returns:
      A number per row, or None when the model has a single tuning.

    Raises:
      UserError: for an unknown name, another number of names than rows, or a single tuning.
    """
    if not tuning.adapters:
        if names is not None:
            raise UserError("the model has a single tuning; call `load_adapters` to choose")
        return None
    names = [None] * rows if names is None else names
    if len(names) != rows:
        raise UserError(f"{rows} prompts but {len(names)} adapters")
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(tuning.adapters)}
    numbers |= {BASE: -1, None: -1}
    for name in names:
        if name not in numbers:
            raise choice_error("adapter", name, (*tuning.adapters, BASE))
    return np.asarray([numbers[name] for name in names], np.int32)
