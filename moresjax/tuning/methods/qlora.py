"""QLoRA: LoRA over a frozen LLM of eight-bit weights (after Dettmers et al. 2023, who use four)."""

import dataclasses

from moresjax.core.errors import UserError
from moresjax.tuning.base import Method, ModelConfig, register
from moresjax.tuning.methods.lora import LoRA


@register
@dataclasses.dataclass(frozen=True)
class QLoRA(LoRA):
    """`lora` with the promise that the LLM is quantised; what it trains is a `lora`."""

    name = "qlora"

    def resolve(self, config: ModelConfig) -> Method:
        if not config.llm.int8:
            raise UserError("qlora needs an LLM in eight bits (quantize=int8); else use lora")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return LoRA(**fields)
