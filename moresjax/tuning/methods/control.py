"""Control by region and token (Re-Imagining Multimodal Instruction Tuning, sections 3.3 and 4.3).

Three groups of the editors of `mrt`, each a low-rank edit `h' = h + (h W^T + b - h R) R^T`:

    visual      the outputs of the used blocks of the vision encoder, at patches of the region
    connector   the visual tokens of the region
    text        the output of the first block of the LLM, at the tokens of the indicator

All else is frozen. Regions and marks are those of the samples (`data.control`).
"""

import dataclasses
import functools

from moresjax.core.errors import choice_error
from moresjax.core.ranges import Rate, Size
from moresjax.tuning.base import Method, layer_field, register
from moresjax.tuning.methods.reft import LoReFT

GROUPS = ("visual", "connector", "text")


@register
@dataclasses.dataclass(frozen=True)
class Control(Method):
    """Editors of a region and of a token.

    Attributes:
      rank: The rank of the editor in the LLM.
      visual_rank: The rank of those in the vision encoder and after the connector.
      mark: The name of the mark whose tokens are edited.
      groups: The groups of editors that there are, such as `text` or `visual;connector`.
      layers: The blocks of the LLM that are edited: the paper edits the first.
      visual_layers: The blocks of the vision encoder that are edited.
      dropout: The rate of dropout on every delta.
      init: The start of every editor, `paper` or `identity`.
    """

    name = "control"
    rank: Size = 4
    visual_rank: Size = 6
    mark: str = "indicator"
    groups: str = ";".join(GROUPS)
    layers: str = "0"
    visual_layers: str = layer_field()
    dropout: Rate = 0.0
    init: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in self.groups.split(";"):
            if group not in GROUPS:
                raise choice_error("group of control", group, GROUPS)

    def parts(self) -> tuple[Method, ...]:
        edit = functools.partial(LoReFT, dropout=self.dropout, init=self.init)
        visual = functools.partial(edit, rank=self.visual_rank, positions="roi")
        parts = {
            "visual": visual(site="vision.block.out", layers=self.visual_layers),
            "connector": visual(site="connector.out"),
            "text": edit(rank=self.rank, positions=f"mark({self.mark})", layers=self.layers),
        }
        return tuple(part for name, part in parts.items() if name in self.groups.split(";"))
