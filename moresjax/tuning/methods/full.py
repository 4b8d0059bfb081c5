"""Full fine-tuning, and none: what trains is base parameters, nothing is attached."""

import dataclasses

from moresjax.tuning.base import Method, register


@register
@dataclasses.dataclass(frozen=True)
class NoTuning(Method):
    """Leaves the LLM as it is; with the default `also_train` only the connector trains."""

    name = "none"


@register
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains every parameter of the LLM."""

    name = "full"
    trains = ("llm",)
