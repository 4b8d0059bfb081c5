"""Exact parameter counts, from shapes only."""

import dataclasses
import math
from collections.abc import Sequence

from flax import nnx

from moresjax.core.parameter_names import matches, path_name
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.tuning.attach import Tuning


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of one component."""

    total: int
    trainable: int


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """Parameters per component (`vision`, `connector`, `llm`, `tuning`).

    Attributes:
      components: counts of each part of the model.
      trainable_in_llm: the "TP" of the papers: what trains in the LLM, tuning included.
    """

    components: dict[str, Count]
    trainable_in_llm: int

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return sum(count.total for count in self.components.values())

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(count.trainable for count in self.components.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the saved trainable parameters (fp32)."""
        return 4 * self.trainable

    def to_dict(self) -> dict:
        """The report as JSON takes it."""
        return {
            "components": {k: dataclasses.asdict(v) for k, v in self.components.items()},
            "total": self.total,
            "trainable": self.trainable,
            "trainable_in_llm": self.trainable_in_llm,
            "trainable_share": self.trainable / self.total,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def count_parameters(
    config: MLLMConfig, tuning: str = "none", also_train: tuple[str, ...] = ("connector",)
) -> ParameterReport:
    """Counts without allocating any weights.

    >>> from moresjax.models.zoo import mllm_config
    >>> report = count_parameters(mllm_config("llava-1.5-7b"), "mores:rank=1")
    >>> report.trainable_in_llm
    262176

    Args:
      config: The architecture.
      tuning: The tuning spec. Layers that a method does not act on do not count.
      also_train: Paths of base parameters that train too.

    Raises:
      UserError: when the spec is malformed or does not fit the model.
    """
    model = MLLM(config, tuning)
    patterns = (*also_train, *model.tuning.trains)
    totals: dict[str, list[int]] = {}
    in_llm = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "derived" in variable.get_metadata():  # the factors of int8 kernels
            continue
        name = path_name(path)
        part = name.split(".")[0]
        size = math.prod(variable.shape)
        if part == "tuning":
            size = _in_acting_layers(size, model.tuning, path)
        trains = any(matches(name, pattern) for pattern in patterns)
        total, trainable = totals.setdefault(part, [0, 0])
        totals[part] = [total + size, trainable + size * trains]
        site = path[3] if part == "tuning" else name
        in_llm += size * trains * str(site).startswith("llm")
    return ParameterReport({k: Count(*v) for k, v in totals.items()}, in_llm)


def _in_acting_layers(size: int, tuning: Tuning, path: Sequence) -> int:
    """Parameters in layers that the method acts on; `path` is tuning.params.METHOD.SITE.LEAF."""
    _, _, key, site, _ = path
    layer_mask = tuning.layer_mask(key, site)
    return size if layer_mask is None else size // len(layer_mask) * int(layer_mask.sum())
