"""The ReFT family (Wu et al. 2024; the variants of the pyreft library).

Axis legend: D features, r rank. `R` is D x r, `W` is r x D, `b` has r entries.

    loreft     h + (h W^T + b - h R) R^T      orthonormal R
    noreft     h + (h W^T + b - h R) R^T      free R
    direft     h + (h W^T + b) R^T            orthonormal R
    nodireft   h + (h W^T + b) R^T            free R
    consreft   h + (b - h R) R^T              orthonormal R
    lobireft   h + b R^T                      orthonormal R

They start as pyreft starts them: `W` and `b` as torch's linear, `R` orthonormal or, where it is
free, as torch's linear. None of them is the identity then.
"""

import dataclasses

from moresjax.core.ranges import Rate, Size
from moresjax.tuning.base import Method, layer_field, register
from moresjax.tuning.low_rank import LowRankEdit
from moresjax.tuning.spec import check_choice


@dataclasses.dataclass(frozen=True)
class ReFT(LowRankEdit):
    """What the family has in common: by default the first and last 4 tokens of the prompt."""

    positions: str = "prompt:f4+l4"


@register
@dataclasses.dataclass(frozen=True)
class LoReFT(ReFT):
    """Low-rank linear subspace ReFT: the same equation as MoReS, at text positions."""

    name = "loreft"


@register
@dataclasses.dataclass(frozen=True)
class DiReFT(ReFT):
    """LoReFT without the subtraction."""

    name = "direft"
    subtracts = False


@register
@dataclasses.dataclass(frozen=True)
class ConsReFT(ReFT):
    """The subspace is set to a constant."""

    name = "consreft"
    has_weight = False


@register
@dataclasses.dataclass(frozen=True)
class LobiReFT(ReFT):
    """A constant is added in a subspace."""

    name = "lobireft"
    has_weight, subtracts = False, False


@register
@dataclasses.dataclass(frozen=True)
class NoReFT(ReFT):
    """LoReFT with a free `R`."""

    name = "noreft"
    orthogonal = False


@register
@dataclasses.dataclass(frozen=True)
class NoDiReFT(ReFT):
    """DiReFT with a free `R`."""

    name = "nodireft"
    orthogonal, subtracts = False, False


FAMILY: dict[str, type[ReFT]] = {
    method.name: method for method in (LoReFT, NoReFT, DiReFT, NoDiReFT, ConsReFT, LobiReFT)
}


@register
@dataclasses.dataclass(frozen=True)
class UnsharedReFT(Method):
    """Two edits of one kind with weights of their own: for the first and for the last tokens.

    Attributes:
      kind: a method of the family.
      first: tokens at the start of `region`, at most half of it.
      last: tokens at its end, at most half of it.
      region: a region of selectors.
    """

    name = "reft"
    kind: str = "loreft"
    rank: Size = 4
    first: Size = 4
    last: Size = 4
    region: str = "prompt"
    layers: str = layer_field()
    dropout: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "kind", tuple(FAMILY))

    def parts(self) -> tuple[Method, ...]:
        prefix, suffix = f"{self.region}:f{self.first}+l0", f"{self.region}:f0+l{self.last}"
        return tuple(
            FAMILY[self.kind](
                positions=positions, rank=self.rank, layers=self.layers, dropout=self.dropout
            )
            for positions in (prefix, suffix)
        )
