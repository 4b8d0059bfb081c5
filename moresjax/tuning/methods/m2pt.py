"""M2PT: learned tokens in both towers (Wang et al. 2024).

Every used block of the vision encoder (`vpt`) and every block of the LLM (`ptum`) has learned
tokens of its own; connector and vocabulary head train in full. In the released code the visual
tokens stand before the class token, so that dropping the first token drops one of them and the
others reach the connector; here the connector gets the patches, as the paper draws it.
"""

import dataclasses

from moresjax.core.ranges import Size
from moresjax.tuning.base import Method, register
from moresjax.tuning.methods.full import Partial
from moresjax.tuning.methods.ptum import PTUM
from moresjax.tuning.methods.vpt import VPT


@register
@dataclasses.dataclass(frozen=True)
class M2PT(Method):
    """Learned tokens in both towers, and what else trains.

    Attributes:
      visual_length: learned tokens in the vision encoder.
      length: learned tokens in the LLM.
      train: parts of the model that train in full.
    """

    name = "m2pt"
    visual_length: Size = 10
    length: Size = 10
    train: str = "connector;lm_head"

    def parts(self) -> tuple[Method, ...]:
        visual = VPT(length=self.visual_length, init="xavier")
        return visual, PTUM(length=self.length), Partial(train=self.train)
