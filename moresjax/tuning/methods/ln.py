"""LN tuning: the norms of the LLM train, and nothing else of it (Zhao et al. 2023)."""

import dataclasses

from moresjax.core.errors import choice_error
from moresjax.tuning.base import Method, ModelConfig, Sites, register

# Patterns of what stands outside the plain layout, `blocks.NAME`, of the LLM and of the encoder.
_SPECIAL = {
    "all": r"llm\.(blocks\.\w+_norm|norm)",
    "norm": r"llm\.norm",
    "q_norm": r"llm\.blocks\.attn\.q_norm",
    "k_norm": r"llm\.blocks\.attn\.k_norm",
    "vision.all": r"vision\.((blocks|last)\.\w+_norm|pre_norm|post_norm)",
    "vision.pre_norm": r"vision\.pre_norm",
    "vision.post_norm": r"vision\.post_norm",
}


@register
@dataclasses.dataclass(frozen=True)
class NormTuning(Method):
    """Trains norms, named by `targets`.

    `all` are those of the LLM's blocks and its final norm (`norm`), not those of queries and keys
    (`q_norm`, `k_norm`); `attn_norm;mlp_norm` are some of a block's, `vision.attn_norm` is one of
    the vision encoder's blocks, `vision.all` are all of the encoder that run.
    """

    name = "ln"
    targets: str = "all"

    @property
    def trains(self) -> tuple[str, ...]:
        patterns = []
        for target in self.targets.split(";"):
            tower, _, name = target.rpartition(".")
            plain = rf"vision\.(blocks|last)\.{name}" if tower else rf"llm\.blocks\.{name}"
            patterns.append(rf"{_SPECIAL.get(target, plain)}\.(scale|bias)")
        return tuple(patterns)

    def sites(self, config: ModelConfig) -> Sites:
        available = ["all", *config.llm.norms()]
        if config.vision is not None and not config.vision.is_pair:
            available += ["vision.all", *(f"vision.{name}" for name in config.vision.norms())]
        for target in self.targets.split(";"):
            if target not in available:
                raise choice_error(f"target of {self.name}", target, available)
        return {}
