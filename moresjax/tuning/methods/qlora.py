"""QLoRA: LoRA over a frozen LLM of eight-bit weights (after Dettmers et al. 2023, who use four)."""

import dataclasses

from moresjax.core.errors import UserError
from moresjax.tuning.base import Method, ModelConfig, register
from moresjax.tuning.methods.lora import LoRA
from moresjax.tuning.spec import format_spec, parse_spec


@register
@dataclasses.dataclass(frozen=True)
class QLoRA(LoRA):
    """`lora` with the promise that the LLM is quantised; what it trains is a `lora`."""

    name = "qlora"

    def resolve(self, config: ModelConfig) -> Method:
        if not config.llm.int8:
            raise UserError("qlora needs an LLM in eight bits (quantize=int8); else use lora")
        return self.over_whole_weights()

    def over_whole_weights(self) -> LoRA:
        """The same without the promise."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return LoRA(**fields)


def without_qlora(spec: str) -> str:
    """The spec with `lora` in the place of `qlora`.

    >>> without_qlora("qlora:rank=2/ln")
    'lora:rank=2/ln'
    """
    methods = parse_spec(spec)
    if not any(isinstance(method, QLoRA) for method in methods):
        return spec
    return format_spec(m.over_whole_weights() if isinstance(m, QLoRA) else m for m in methods)
