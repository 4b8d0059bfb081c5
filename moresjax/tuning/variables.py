"""What a tuning holds beside parameters that train.

Axis legend: L layers, A adapters and, last, the base model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx


class LayerMask(nnx.Variable):
    """Which layers a method acts on, `[L]`: data, so that one program serves every choice."""


class Shared(nnx.Variable):
    """A frozen array that all layers of a method use."""


class Constant(nnx.Variable):
    """What a method was given rather than has to learn: no parameter, so nothing trains it."""


class Places(nnx.Variable):
    """For every adapter, and last for the base model, its place among the pieces of a kind `[A]`.

    The last place does nothing.
    """


class Lengths(nnx.Variable):
    """How many of its virtual tokens each piece of a kind has."""


class OwnParameter(nnx.Variable):
    """A parameter of the connector for every adapter that has its own, and last the base's."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Which adapters a tuning holds. It takes no part in comparisons, so programs do not know it.

    Attributes:
      numbers: The numbers of the adapters, as `Batch.adapter` has them, by name.
      source: What the tuning was stacked from, for `tuning.multi_adapter`.
    """

    numbers: Mapping[str, int] = dataclasses.field(compare=False)
    source: Any = dataclasses.field(default=None, compare=False)
