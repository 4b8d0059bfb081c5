"""MRT: multimodal representation tuning (Re-Imagining Multimodal Instruction Tuning, equation 1).

Every editor is a low-rank edit, `h' = h + (h W^T + b - h R) R^T`:

    visual      the output of the used blocks of the vision encoder, class token included
    connector   the visual tokens it hands over
    prefix      the first tokens of the question, at every block of the LLM
    suffix      the last ones, with weights of their own

The authors read the features of the second-last block, so with such an encoder every *used* block
is every block but the last. Their released code differs from the paper: see `mrt-code`.

In a prompt of LLaVA v1 the text after an image begins with a blank and a newline (two tokens of
LLaMA's), and the code counts from the token after them to the last but one: `skip=2;1`.
"""

import dataclasses
import functools
import re

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import Rate, Size
from moresjax.tuning.base import Method, layer_field, register
from moresjax.tuning.methods.reft import LoReFT
from moresjax.tuning.spec import check_choice, preset

SCOPES = {"prompt": "question", "sequence": "dialogue"}
GROUPS = ("visual", "connector", "prefix", "suffix")


@register
@dataclasses.dataclass(frozen=True)
class MRT(Method):
    """Four groups of editors, or some of them.

    Attributes:
      groups: which groups there are.
      text: which tokens of the text are edited: `ends` (prefix and suffix), or `all` by one editor
        a block.
      rank: rank of the editors in the LLM.
      visual_rank: rank of those in the vision encoder and after the connector.
      length: tokens in the prefix and in the suffix, each at most half of the text.
      scope: the text that is meant: `prompt` (the question), or `sequence`: in training, where
        answers follow, up to the last answer.
      skip: how many tokens at the start and at the end of the text do not count.
      layers: the blocks of the LLM that are edited.
      visual_layers: the blocks of the vision encoder that are edited.
      dropout: the rate of dropout on every delta.
      init: the start of every editor, `paper` or `identity`.
    """

    name = "mrt"
    groups: str = ";".join(GROUPS)
    text: str = "ends"
    rank: Size = 4
    visual_rank: Size = 6
    length: Size = 4
    scope: str = "prompt"
    skip: str = "0;0"
    layers: str = layer_field()
    visual_layers: str = layer_field()
    dropout: Rate = 0.0
    init: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scope", tuple(SCOPES))
        check_choice(self, "text", ("ends", "all"))
        names = self.groups.split(";")
        for name in names:
            if name not in GROUPS:
                raise choice_error("group of mrt:groups", name, GROUPS)
        if len(set(names)) < len(names):
            raise UserError(f"mrt:groups={self.groups} names a group twice")
        if self.text == "all" and ("prefix" in names) != ("suffix" in names):
            raise UserError(
                f"mrt:groups={self.groups} with text=all: one editor takes all of the text; "
                "name both prefix and suffix, or neither"
            )
        if not re.fullmatch(r"\d+;\d+", self.skip):
            raise UserError(f"mrt:skip is two whole numbers as in skip=2;1, got {self.skip!r}")

    def parts(self) -> tuple[Method, ...]:
        edit = functools.partial(LoReFT, dropout=self.dropout, init=self.init)
        visual = functools.partial(edit, rank=self.visual_rank)
        text = functools.partial(edit, rank=self.rank, layers=self.layers)
        skip = "" if self.skip == "0;0" else f"skip({self.skip})"
        scope, plus = SCOPES[self.scope], skip and f"{skip}+"
        groups: dict[str, Method] = {
            "visual": visual(site="vision.block.out", positions="all", layers=self.visual_layers),
            "connector": visual(site="connector.out", positions="image"),
        }
        if self.text == "all":
            groups["prefix"] = text(positions=scope + (skip and f":{skip}"))
        else:
            groups["prefix"] = text(positions=f"{scope}:{plus}f{self.length}+l0")
            groups["suffix"] = text(positions=f"{scope}:{plus}f0+l{self.length}")
        return tuple(editor for name, editor in groups.items() if name in self.groups.split(";"))


preset("mrt-paper", "mrt:length=4")
preset("mrt-code", "mrt:length=6,scope=sequence,skip=2;1,visual_layers=1-")
