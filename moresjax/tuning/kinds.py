"""Kinds of methods: what one compiled program does for adapters that differ in numbers only.

Axis legend: L layers.

Adapters that rows of a batch choose from are made of pieces of a few kinds. A `Kind` is a method at
its positions and its site, with the shapes of its largest piece and a number of places. Smaller
pieces have zeros in the rest. Kinds stand in an order in which every adapter finds its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moresjax.core.errors import UserError
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Method, Params, VirtualTokens, WeightDelta
from moresjax.tuning.layered import mask_layers, prepare_layers
from moresjax.tuning.variables import Constant

# Shapes of raw parameters by name, with a leading layer axis where the site has layers.
Shapes = Mapping[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The room for the pieces of one kind, or what one piece asks for.

    Attributes:
      method: The method, as narrow as can be.
      width: The largest width; 0 for a method without one.
      places: How many pieces there is room for.
      shapes: The largest shapes of raw parameters, by site.
      common: Frozen arrays that all layers and pieces share.
      constant: Whether parameters are given rather than learned.
    """

    method: Method
    width: int
    places: int
    shapes: Mapping[str, Shapes]
    common: Mapping[str, np.ndarray]
    constant: bool

    @property
    def wide(self) -> Method:
        """The method with the kind's width and linears."""
        changes: dict[str, Any] = {}
        if isinstance(self.method, VirtualTokens):
            changes["length"] = self.width
        if getattr(self.method, "targets", "") == "all":
            names = (site.replace(".block", "").removeprefix("llm.") for site in self.shapes)
            changes["targets"] = ";".join(names)
        method = dataclasses.replace(self.method, **changes)
        return method.widened(self.width) if method.width else method

    def with_room_for(self, other: "Kind") -> "Kind":
        """The smallest kind that pieces of both fit in.

        Raises:
          UserError: The two have different frozen arrays.
        """
        for leaf, x in self.common.items():
            if not np.array_equal(x, other.common[leaf]):
                raise UserError(
                    f"the adapters bring different frozen arrays {leaf!r} of {self.method.name}"
                )
        shapes = {site: dict(own) for site, own in self.shapes.items()}
        for site, own in other.shapes.items():
            mine = shapes.setdefault(site, dict(own))
            for leaf, shape in own.items():
                mine[leaf] = tuple(map(max, mine[leaf], shape))
        return dataclasses.replace(
            self,
            width=max(self.width, other.width),
            places=max(self.places, other.places),
            shapes=shapes,
        )

    def neutral(self, site: str) -> Arrays:
        """What a row without such a piece has, prepared."""
        zeros = {n: jnp.zeros(shape) for n, shape in self.shapes[site].items()}
        return _host(_prepared(self.wide, self._layers(site), zeros, None))

    def piece(self, site: str, params: Mapping[str, np.ndarray], acts: np.ndarray | None) -> Arrays:
        """Raw parameters of a piece at a site, grown to the kind's shapes and prepared.

        Args:
          site: The site.
          params: The parameters, as `kind` means them.
          acts: The layers that it acts on; None outside the blocks.
        """
        grown = {}
        for leaf, shape in self.shapes[site].items():
            grown[leaf] = np.zeros(shape, np.float32)
            grown[leaf][tuple(map(slice, params[leaf].shape))] = params[leaf]
        mask = np.asarray(True) if acts is None else acts
        return _host(_prepared(self.wide, self._layers(site), grown, mask))

    @staticmethod
    def _layers(site: str) -> bool:
        return ".block." in site


def _host(params: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(x) for name, x in params.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepared(method: Method, layered: bool, params: Params, acts: Any) -> Params:
    """Parameters as a forward pass uses them; `acts` None: nowhere."""
    if isinstance(method, VirtualTokens):
        return params
    first = next(iter(params.values()))
    if acts is None:
        acts = jnp.asarray(False)
    acts = jnp.broadcast_to(acts, first.shape[:1] if layered else ())
    if isinstance(method, WeightDelta):
        params = mask_layers(method, params, acts)
    return prepare_layers(method, params, acts)


def pieces_of(tuning: Tuning) -> list[tuple[str, Kind]]:
    """The pieces of an adapter in their order: its key of the method, and what it asks for.

    Raises:
      UserError: A method cannot be chosen per row.
    """
    found = []
    for key, method in tuning.methods:
        sites = tuning.params.get(key, {})
        if getattr(method, "sees_tokens", False):
            raise UserError(
                f"{method.name} chooses factors by all tokens of a row and cannot be chosen per "
                "row; load such an adapter alone"
            )
        if isinstance(method, VirtualTokens) and any(s.startswith("vision.") for s in sites):
            raise UserError(
                f"{method.name} puts tokens into the vision encoder and cannot be chosen per row; "
                "load such an adapter alone"
            )
        if not sites:
            continue  # it stands for parameters of the model itself
        shapes = {site: {n: tuple(x.shape) for n, x in own.items()} for site, own in sites.items()}
        values = [x for own in sites.values() for x in own.values()]
        width = getattr(method, method.width) if method.width else 0
        if isinstance(method, VirtualTokens):
            width = method.length
        common = {n: np.asarray(x) for n, x in tuning.common(key).items()}
        constant = all(isinstance(x, Constant) for x in values)
        found.append((key, Kind(method.kind(), width, 1, shapes, common, constant)))
    return found


def merge_orders(first: Sequence[Method], second: Sequence[Method]) -> list[Method]:
    """The shortest sequence in which both have their own order."""

    @functools.cache
    def merged(i: int, j: int) -> tuple[Method, ...]:
        if i == len(first) or j == len(second):
            return (*first[i:], *second[j:])
        if first[i] == second[j]:
            return (first[i], *merged(i + 1, j + 1))
        ways = (first[i], *merged(i + 1, j)), (second[j], *merged(i, j + 1))
        return min(ways, key=len)

    return [*merged(0, 0)]


def find_in_order(order: Sequence[Method], methods: Sequence[Method]) -> list[int] | None:
    """Where in `order` methods are, one after the other; None where they are not."""
    places, start = [], 0
    for method in methods:
        while start < len(order) and order[start] != method:
            start += 1
        if start == len(order):
            return None
        places.append(start)
        start += 1
    return places
