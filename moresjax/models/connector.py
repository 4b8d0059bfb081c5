"""Connectors: visual features to the embedding space of the decoder.

Axis legend: B images, V visual tokens, C vision features, D decoder features.
"""

import re

from flax import nnx
from jaxtyping import Array, Float

from moresjax.errors import choice_error
from moresjax.models.layers import ACTIVATIONS, Linear

CONNECTORS = ("identity", "linear", "mlp{n}x_gelu")


def connector_depth(name: str) -> int:
    """Number of linears of a connector.

    Raises:
      UserError: for an unknown name.
    """
    if name in ("identity", "linear"):
        return int(name == "linear")
    if m := re.fullmatch(r"mlp([1-9]\d*)x_gelu", name):
        return int(m[1])
    raise choice_error("connector", name, CONNECTORS)


class Connector(nnx.Module):
    """`identity`, `linear`, or `mlp{n}x_gelu`: n linears with exact GELU between them."""

    def __init__(self, name: str, d_in: int, d_out: int):
        self.layers = nnx.List()
        for i in range(connector_depth(name)):
            width = d_in if i == 0 else d_out
            self.layers.append(Linear(width, d_out, axes=(None, "embed"), bias=True))

    def __call__(self, x: Float[Array, "B V C"]) -> Float[Array, "B V D"]:
        for i, layer in enumerate(self.layers):
            x = layer(ACTIVATIONS["gelu"](x) if i else x)
        return x
