"""APrompt: learned tokens and learned keys and values in every block (Wang et al. 2023).

The paper's third kind, prompts of queries and keys, is not here: how rows of queries and keys
without values enter attention is not to be had from the sources of this project.
"""

import dataclasses

from moresjax.core.ranges import Size
from moresjax.tuning.base import Method, register
from moresjax.tuning.methods.prefix import Prefix
from moresjax.tuning.methods.ptum import PTUM


@register
@dataclasses.dataclass(frozen=True)
class APrompt(Method):
    """`length` tokens, and `kv_length` keys and values, per block of the LLM."""

    name = "aprompt"
    length: Size = 10
    kv_length: Size = 10

    def parts(self) -> tuple[Method, ...]:
        return PTUM(length=self.length), Prefix(length=self.kv_length)
