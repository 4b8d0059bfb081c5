"""MRT: multimodal representation tuning (Re-Imagining Multimodal Instruction Tuning, equation 1).

Every editor is a low-rank edit, `h' = h + (h W^T + b - h R) R^T`:

    visual      the output of the used blocks of the vision encoder, class token included
    connector   the visual tokens it hands over
    prefix      the first tokens of the question, at every block of the LLM
    suffix      the last ones, with weights of their own

The authors read the features of the second-last block, so with such an encoder every *used* block
is every block but the last. Their released code differs from the paper: see `mrt-code`.
"""

import dataclasses

from moresjax.core.errors import UserError
from moresjax.tuning.base import Method, layer_field, register
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.spec import check_choice, preset

SCOPES = {"prompt": "question", "sequence": "dialogue"}


@register
@dataclasses.dataclass(frozen=True)
class MRT(Method):
    """All four groups of editors.

    Attributes:
      rank: of the editors in the LLM.
      visual_rank: of those in the vision encoder and after the connector.
      length: tokens in the prefix and in the suffix, each at most half of the text.
      scope: where the suffix ends: `prompt` (the question), or `sequence`: in training, where
        answers follow, the last answer.
      layers: blocks of the LLM.
      visual_layers: blocks of the vision encoder.
    """

    name = "mrt"
    rank: int = 4
    visual_rank: int = 6
    length: int = 4
    scope: str = "prompt"
    layers: str = layer_field()
    visual_layers: str = layer_field()
    dropout: float = 0.0
    init: str = "paper"

    def __post_init__(self):
        check_choice(self, "scope", tuple(SCOPES))
        if self.length < 1:
            raise UserError(f"mrt:length must be at least 1, got {self.length}")

    def parts(self):
        common = {"dropout": self.dropout, "init": self.init}
        visual = common | {"rank": self.visual_rank}
        text = common | {"rank": self.rank, "layers": self.layers}
        prefix, suffix = f"question:f{self.length}+l0", f"f0+l{self.length}"
        return (
            LoReFT(site="vision.block.out", positions="all", layers=self.visual_layers, **visual),
            LoReFT(site="connector.out", positions="image", **visual),
            LoReFT(positions=prefix, **text),
            LoReFT(positions=f"{SCOPES[self.scope]}:{suffix}", **text),
        )


preset("mrt-paper", "mrt:length=4")
preset("mrt-code", "mrt:length=6,scope=sequence,visual_layers=1-")
