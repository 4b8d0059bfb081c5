"""Parameters of methods that act in some of the layers only, which is what files hold."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from moresjax.core.types import AnyArray


def entries_of_layers(acts: Bool[AnyArray, " L"]) -> Int[np.ndarray, " L"]:
    """For every layer, which of the acting layers' parameters it gets.

    A layer that does not act gets what its neighbour before it has, and the first ones what the
    first acting layer has: parameters like any others.

    >>> entries_of_layers(np.array([False, True, False, True])).tolist()
    [0, 0, 0, 1]
    """
    return np.maximum(np.cumsum(acts) - 1, 0)


def fill_layers(
    acting: Mapping[int, Float[np.ndarray, "..."]], num_layers: int
) -> Float[np.ndarray, "L ..."]:
    """The parameters of all layers, stacked, from those of the layers that act.

    >>> fill_layers({1: np.zeros(1), 3: np.ones(1)}, 4).tolist()
    [[0.0], [0.0], [0.0], [1.0]]
    """
    stacked = np.stack([acting[layer] for layer in sorted(acting)])
    return stacked[entries_of_layers(np.isin(np.arange(num_layers), [*acting]))]
