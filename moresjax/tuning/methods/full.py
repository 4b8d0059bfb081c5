"""Full and partial fine-tuning, and none: what trains is base parameters, nothing is attached."""

import dataclasses

from moresjax.core.errors import UserError, choice_error
from moresjax.tuning.base import Method, ModelConfig, Sites, register

# Parts by name, with the paths of their parameters; what never runs of the encoder is none of them.
PARTS = {
    "connector": "connector",
    "lm_head": "lm_head",
    "embed": "llm.embed",
    "vision": r"vision\.(?!tail\.|post_norm\.).*",
    "biases": r"(llm|connector|vision\.(?!tail\.|post_norm\.).*)\.(.*\.)?bias",
}


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
    """Trains the parts named by `train`, as `also_train` does, but as a piece of a method.

    `biases` are those of all linears and norms.
    """

    name = "partial"
    train: str = "connector;lm_head"

    def __post_init__(self) -> None:
        for part in self.train.split(";"):
            if part not in PARTS:
                raise choice_error("part in partial:train", part, PARTS)

    @property
    def trains(self) -> tuple[str, ...]:
        return tuple(PARTS[part] for part in self.train.split(";"))

    def sites(self, config: ModelConfig) -> Sites:
        has = {"connector": config.vision is not None, "vision": config.vision is not None}
        has["lm_head"] = not config.llm.tie_embeddings
        for part in self.train.split(";"):
            if not has.get(part, True):
                raise UserError(f"{self.name}:train={self.train}: this model has no {part}")
        return {}
