"""Connectors: visual features to the embedding space of the decoder.

Axis legend: B images, V visual features, T visual tokens, C vision features, D decoder features.

A connector is named by a string, `NAME` or `NAME:option=value,...` (`resampler:latents=64`). The
resampler and the Q-Former turn any number of features into a fixed number of tokens, `concat4-` and
so on put that many neighbours side by side in one token, `pool4-` and so on take the mean of a
square of 4 by 4; all others keep the number. `norm-` is a LayerNorm before the linears, `rmsnorm-`
an RMSNorm (that of Gemma, whose scales are beside one), and linears with `-nobias` have no bias.
"""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.core.errors import UserError, choice_error
from moresjax.models.layers import ACTIVATIONS, Linear, Norm
from moresjax.models.qformer import QFormer, QFormerConfig
from moresjax.models.resampler import Resampler, ResamplerConfig
from moresjax.tuning.hooks import Hooks

CONNECTORS = (
    "identity",
    "linear",
    "mlp{n}x_gelu",
    "concat{m}-linear",
    "concat{m}-mlp{n}x_gelu",
    "norm-linear",
    "norm-mlp{n}x_gelu",
    "pool{m}-rmsnorm-linear-nobias",
    "fused-gelu-mlp",
    "mof_mlp",
    "resampler",
    "qformer",
)
NO_BIAS = "-nobias"
# How many neighbours are put side by side, or the side of the square whose mean is taken; whether a
# norm follows; the chain of linears behind, and whether it goes without biases.
_MANY = r"[2-9]|[1-9]\d{1,3}"
_CHAIN = rf"(?:concat({_MANY})-|pool({_MANY})-)?(?:(?:rms)?norm-)?(linear|mlp\d.+?)(?:{NO_BIAS})?"
NORM_EPS, RMS_NORM_EPS = 1e-5, 1e-6
# Those that read the features with learned queries.
QUERYING: dict[str, type[ResamplerConfig] | type[QFormerConfig]] = {
    "resampler": ResamplerConfig,
    "qformer": QFormerConfig,
}


def build_connector(name: str, d_in: int, d_out: int, *, unroll: bool = False) -> "AnyConnector":
    """The module of a connector, `[B, V, C] -> [B, T, D]`.

    Raises:
      UserError: for an unknown name or option.
    """
    kind, options = parse_connector(name)
    if isinstance(options, ResamplerConfig):
        return Resampler(options, d_in, d_out, unroll=unroll)
    if isinstance(options, QFormerConfig):
        return QFormer(options, d_in, d_out, unroll=unroll)
    return MoFConnector(d_in, d_out) if kind == "mof_mlp" else Connector(name, d_in, d_out)


def parse_connector(name: str) -> tuple[str, ResamplerConfig | QFormerConfig | None]:
    """The kind and the options of a connector.

    >>> parse_connector("resampler:latents=64")
    ('resampler', ResamplerConfig(latents=64, layers=3, heads=8, head_dim=64, expansion=4))
    >>> parse_connector("concat4-linear")
    ('concat4-linear', None)

    Returns:
      The name without options, and the configuration of one that reads the features with learned
      queries.

    Raises:
      UserError: for an unknown name or option.
    """
    kind, colon, text = name.partition(":")
    if kind not in QUERYING:
        if colon or (kind != "mof_mlp" and linear_widths(kind, 1, 1) is None):
            raise choice_error("connector", name, CONNECTORS)
        return kind, None
    config, options = QUERYING[kind], {}
    fields = [field.name for field in dataclasses.fields(config)]
    for item in text.split(",") if colon else ():
        key, _, value = item.partition("=")
        if key not in fields:
            raise choice_error(f"option of connector {kind}", key, fields)
        if not re.fullmatch(r"[1-9]\d{0,8}", value):
            raise UserError(f"connector {kind}: {key} must be a positive integer, got {value!r}")
        options[key] = int(value)
    return kind, config(**options)


def connector_tokens(name: str, features: int) -> int:
    """T, the number of visual tokens that a connector makes of `features` visual features.

    Raises:
      UserError: for an unknown name or option, or a number of neighbours that does not divide the
        number of features.
    """
    _, options = parse_connector(name)
    if options:
        return options.latents
    if features % (side_by_side := neighbours(name)):
        raise UserError(
            f"connector {name} joins {side_by_side} visual features to a token; {features} "
            "features cannot be divided so"
        )
    square, side = pooled_side(name), math.isqrt(features)
    if square > 1 and (side * side != features or side % square):
        raise UserError(
            f"connector {name} takes the mean of {square} x {square} visual features; {features} "
            "features are no square that can be divided so"
        )
    return features // side_by_side // square**2


def feature_tokens(name: str, features: int) -> Int[np.ndarray, " F"] | None:
    """The visual token that each visual feature becomes; None where learned queries read them all.

    >>> feature_tokens("pool2-linear", 16).reshape(4, 4).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]

    Raises:
      UserError: As `connector_tokens`.
    """
    tokens = connector_tokens(name, features)
    if parse_connector(name)[1] is not None:
        return None
    if (square := pooled_side(name)) > 1:
        line = np.arange(math.isqrt(features)) // square
        return (line[:, None] * (line[-1] + 1) + line).reshape(-1)
    return np.arange(features) // (features // tokens)


def neighbours(name: str) -> int:
    """How many consecutive visual features a connector puts side by side in one token.

    >>> neighbours("concat4-linear"), neighbours("linear")
    (4, 1)
    """
    found = re.fullmatch(_CHAIN, name)
    return int(found[1] or 1) if found else 1


def pooled_side(name: str) -> int:
    """The side of the square of visual features whose mean becomes one token.

    >>> pooled_side("pool4-rmsnorm-linear-nobias"), pooled_side("linear")
    (4, 1)
    """
    found = re.fullmatch(_CHAIN, name)
    return int(found[2] or 1) if found else 1


def linear_widths(name: str, d_in: int, d_out: int) -> list[int] | None:
    """Features before, between and after the linears of a chain; None for another connector."""
    if found := re.fullmatch(_CHAIN, name):
        name, d_in = found[3], int(found[1] or 1) * d_in
    if name == "identity":
        return [d_in]
    if name == "linear":
        return [d_in, d_out]
    if name == "fused-gelu-mlp":
        return [d_in, 4 * d_in, d_out, d_out]
    if m := re.fullmatch(r"mlp([1-9]\d?)x_(\w+)", name):
        if m[2] not in ACTIVATIONS:
            return None
        return [d_in] + [d_out] * int(m[1])
    return None


class Connector(nnx.Module):
    """A chain of linears with an activation between them, by default exact GELU.

    `identity` has none, `linear` one, `mlp{n}x_gelu` n (or `mlp{n}x_relu` and so on),
    `fused-gelu-mlp` three (the first is four times as wide as the features). `concat4-linear` and
    the like first put so many consecutive features side by side, `pool4-linear` and the like take
    the mean of squares of them, `norm-mlp2x_gelu` and the like have a LayerNorm before the linears,
    `rmsnorm-linear` and the like an RMSNorm; `linear-nobias` and the like have no bias.

    Raises:
      UserError: for another name.
    """

    def __init__(self, name: str, d_in: int, d_out: int) -> None:
        widths = linear_widths(name, d_in, d_out)
        if widths is None:
            raise choice_error("connector", name, CONNECTORS)
        self.activation = name.removesuffix(NO_BIAS).partition("x_")[2] or "gelu"
        self.neighbours, self.square = neighbours(name), pooled_side(name)
        norm = None
        if "rmsnorm-" in name:
            norm = Norm(widths[0], kind="rms", eps=RMS_NORM_EPS, offset=1.0)
        elif "norm-" in name:
            norm = Norm(widths[0], kind="layer", eps=NORM_EPS)
        self.norm = norm
        self.layers, bias = nnx.List(), not name.endswith(NO_BIAS)
        for i, width in enumerate(widths[1:]):
            self.layers.append(Linear(widths[i], width, axes=(None, "embed"), bias=bias))

    def __call__(
        self, x: Float[Array, "B V C"], hooks: Hooks | None = None
    ) -> Float[Array, "B T D"]:
        """Visual features to visual tokens; the weight deltas of `hooks` act on the linears."""
        hooks = hooks or Hooks()
        if self.neighbours > 1:
            x = x.reshape(len(x), -1, self.neighbours * x.shape[-1])
        if (n := self.square) > 1:
            side = math.isqrt(x.shape[1]) // n
            squares = x.reshape(len(x), side, n, side, n, x.shape[-1])
            x = squares.mean((2, 4)).reshape(len(x), side * side, x.shape[-1])
        x = x if self.norm is None else self.norm(x)
        for i, layer in enumerate(self.layers):
            x = ACTIVATIONS[self.activation](x) if i else x
            x = hooks.linear(f"connector.{i}", layer, x)
        return x


class MoFConnector(nnx.Module):
    """`mof_mlp`: an `mlp2x_gelu` for each of two encoders whose features are interleaved."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.branches = nnx.List([Connector("mlp2x_gelu", d_in, d_out) for _ in range(2)])

    def __call__(self, x: Float[Array, "B V C"]) -> Float[Array, "B V D"]:
        """Interleaved visual features to visual tokens."""
        y = jnp.stack([branch(x[:, i::2]) for i, branch in enumerate(self.branches)], axis=2)
        return y.reshape(*x.shape[:2], -1)


AnyConnector = Connector | MoFConnector | Resampler | QFormer
