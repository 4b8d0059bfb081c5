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
import functools

from moresjax.core.ranges import Positive, Rate
from moresjax.tuning.base import Method, layer_field, register
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.spec import check_choice, preset

SCOPES = {"prompt": "question", "sequence": "dialogue"}


@register
@dataclasses.dataclass(frozen=True)
class MRT(Method):
    """All four groups of editors.

    Attributes:
      rank: rank of the editors in the LLM.
      visual_rank: rank of those in the vision encoder and after the connector.
      length: tokens in the prefix and in the suffix, each at most half of the text.
      scope: where the suffix ends: `prompt` (the question), or `sequence`: in training, where
        answers follow, the last answer.
      layers: the blocks of the LLM that are edited.
      visual_layers: the blocks of the vision encoder that are edited.
      dropout: the rate of dropout on every delta.
      init: the start of every editor, `paper` or `identity`.
    """

    name = "mrt"
    rank: Positive = 4
    visual_rank: Positive = 6
    length: Positive = 4
    scope: str = "prompt"
    layers: str = layer_field()
    visual_layers: str = layer_field()
    dropout: Rate = 0.0
    init: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scope", tuple(SCOPES))

    def parts(self) -> tuple[Method, ...]:
        edit = functools.partial(LoReFT, dropout=self.dropout, init=self.init)
        visual = functools.partial(edit, rank=self.visual_rank)
        text = functools.partial(edit, rank=self.rank, layers=self.layers)
        prefix, suffix = f"question:f{self.length}+l0", f"f0+l{self.length}"
        return (
            visual(site="vision.block.out", positions="all", layers=self.visual_layers),
            visual(site="connector.out", positions="image"),
            text(positions=prefix),
            text(positions=f"{SCOPES[self.scope]}:{suffix}"),
        )


preset("mrt-paper", "mrt:length=4")
preset("mrt-code", "mrt:length=6,scope=sequence,visual_layers=1-")
