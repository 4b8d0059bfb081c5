"""LN tuning: the norms of the LLM train, and nothing else of it (Zhao et al. 2023)."""

import dataclasses

from moresjax.tuning.base import Method, register


@register
@dataclasses.dataclass(frozen=True)
class NormTuning(Method):
    """Trains the norms of the LLM's blocks and its final norm; not those of queries and keys."""

    name = "ln"
    trains = (r"llm\.(blocks\.\w+_norm|norm)\.(scale|bias)",)
