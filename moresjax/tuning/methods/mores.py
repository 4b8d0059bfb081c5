"""MoReS: modality linear representation-steering (LLaVA Steering, equations 3 and 4).

Axis legend: B batch, S tokens, D hidden size, r rank.

    h' = h + (h W^T + b - h R) R^T        at selected visual tokens of every selected block's output

`R` (D x r) has orthonormal columns. Steered tokens change what later tokens attend to, through the
KV cache; nothing is left to do while decoding. The last block's output at a visual token feeds
nothing, so with visual positions its parameters get a gradient of exactly zero.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moresjax.core.errors import UserError
from moresjax.core.ops import project
from moresjax.core.ranges import Rate, Size
from moresjax.tuning.base import Method, Params, layer_field, register
from moresjax.tuning.low_rank import LowRankEdit
from moresjax.tuning.spec import check_choice, preset


@register
@dataclasses.dataclass(frozen=True)
class MoReS(LowRankEdit):
    """MoReS at `site`.

    Attributes:
      rank: r.
      init: `paper` starts from a random `R` and torch's default linear (not the identity at step
        0); `identity` sets `W = R^T` and `b = 0`.
      parity: `paper`, or `llava-steering` for the arithmetic of the authors' code: the linear runs
        in half precision, and dropout acts on the whole steered state instead of the delta.
    """

    name = "mores"
    positions: str = "image:f4+l5"
    rank: Size = 1
    parity: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "parity", ("paper", "llava-steering"))
        if self.parity != "paper" and self.init != "paper":
            raise UserError(f"mores:parity={self.parity} has init=paper, got {self.init!r}")

    def prepare(self, params: Params) -> Params:
        if self.parity == "paper":
            return super().prepare(params)
        rotate = self.rotation(params["rotate"])
        half = {name: params[name].astype(jnp.float16) for name in ("weight", "bias")}
        return half | {"rotate": rotate, "up": rotate.T}

    def delta(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        if self.parity == "paper":
            return super().delta(params, h)
        learned = project(h.astype(jnp.float16), params["weight"].T) + params["bias"]
        present = project(h.astype(jnp.float32), params["rotate"]).astype(jnp.float16)
        return project((learned - present).astype(jnp.float32), params["up"])

    def drop(
        self, key: PRNGKeyArray, delta: Float[Array, "B S D"], h: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        if self.parity == "paper":
            return super().drop(key, delta, h)
        return super().drop(key, h + delta, h) - h


@register
@dataclasses.dataclass(frozen=True)
class MoReS2(Method):
    """Two MoReS with weights of their own, for visual and for text tokens."""

    name = "mores2"
    positions: str = "image:f4+l5"
    text_positions: str = "question:f4+l5"
    rank: Size = 1
    text_rank: Size = 1
    layers: str = layer_field()
    dropout: Rate = 0.0
    init: str = "paper"

    def parts(self) -> tuple[Method, ...]:
        mores = functools.partial(MoReS, layers=self.layers, dropout=self.dropout, init=self.init)
        return (
            mores(positions=self.positions, rank=self.rank),
            mores(positions=self.text_positions, rank=self.text_rank),
        )


preset("mores-base", "mores:rank=1")
preset("mores-large", "mores:rank=2")
preset("mores-huge", "mores:rank=4")
