"""Full and partial fine-tuning, and none: what trains is base parameters, nothing is attached."""

import dataclasses

from moresjax.core.errors import UserError, choice_error
from moresjax.tuning.base import Method, ModelConfig, Sites, register

PARTS = ("connector", "lm_head")


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


@register
@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """Trains the parts named by `train`, as `also_train` does, but as a piece of a method."""

    name = "partial"
    train: str = "connector;lm_head"

    def __post_init__(self) -> None:
        for part in self.trains:
            if part not in PARTS:
                raise choice_error("part in partial:train", part, PARTS)

    @property
    def trains(self) -> tuple[str, ...]:
        return tuple(self.train.split(";"))

    def sites(self, config: ModelConfig) -> Sites:
        has = {"connector": config.vision is not None, "lm_head": not config.llm.tie_embeddings}
        for part in self.trains:
            if not has[part]:
                raise UserError(f"{self.name}:train={self.train}: this model has no {part}")
        return {}
