"""VipLLaVA as `transformers` has it: features of several layers, a norm before the two linears."""

from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.connector import NORM_EPS
from moresjax.weights.families.base import register
from moresjax.weights.families.llava import LLAVA_KEYS, Llava


@register
class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration`, whose connector never reads the first token."""

    model_type = "vipllava"
    keys = LLAVA_KEYS | ConfigKeys(neutral={"projector_layernorm_eps": (NORM_EPS,)})
    connector = Llava.connector | {"norm": "multi_modal_projector.projector_layernorm"}
    before = "norm-"
    architecture = "VipLlavaForConditionalGeneration"

    def settings(self, keeps_all: bool) -> dict[str, Any]:
        """The epsilon of the norm.

        Raises:
          UserError: when the connector reads the first token too.
        """
        if keeps_all:
            raise UserError("a VipLLaVA drops the first token of its vision encoder, this one not")
        return {"projector_layernorm_eps": NORM_EPS}
