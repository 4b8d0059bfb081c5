"""The tensors of an adapter folder of `peft`, and the linears that they belong to."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.merge import dense_at
from moresjax.weights.peft_names import PREFIX, canonical, is_targeted, linear_places

logger = logging.getLogger(__name__)
Kernel = Callable[[], Any]


class Tensors:
    """The tensors of a file that nothing has asked for yet, and the names of those it lacks.

    Args:
      arrays: The tensors by their names in the file.
      config: The model's configuration.
      source: The folder, for messages.

    Attributes:
      left: Tensors that nothing has asked for, by their names in this model.
      missing: Names of tensors that were asked for and are not there.
      unused: Names of tensors of modules that never run.
      file_names: The names in the file, without the prefix, by the names in this model.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], config: MLLMConfig, source: str) -> None:
        self.source = source
        self.left: dict[str, np.ndarray] = {}
        self.file_names: dict[str, str] = {}
        self.missing: list[str] = []
        self.unused: list[str] = []
        for stored, x in arrays.items():
            name = canonical(stored, config)
            if name in self.left:
                raise UserError(f"{source} holds {name} twice, as {stored} too")
            self.left[name] = np.asarray(x, np.float32)
            self.file_names[name] = stored.removeprefix(PREFIX)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor; zeros in place of one that the file lacks, which `finish` reports.

        Raises:
          UserError: for a tensor of another shape.
        """
        x = self.left.pop(name, None)
        if x is None:
            self.missing.append(name)
            return np.zeros(shape or (), np.float32)
        self.check_shape(name, x, shape)
        return x

    def check_shape(self, name: str, x: np.ndarray, shape: tuple[int, ...] | None) -> None:
        """Raises a `UserError` when a tensor has another shape than the model needs."""
        if shape is not None and x.shape != shape:
            raise UserError(f"{self.source}: {name} has shape {x.shape}, the model needs {shape}")

    def finish(self) -> None:
        """Raises a `UserError` when tensors were missing, or some are left that nobody took."""
        for what, names in (("lacks", self.missing), ("holds unknown", [*self.left])):
            if names:
                listed = ", ".join(names[:8])
                raise UserError(f"{self.source} {what} tensors ({len(names)}): {listed}")
        if self.unused:
            logger.warning(
                "%s: %d tensors are left out, of modules that the model never runs: %s ..",
                self.source,
                len(self.unused),
                self.unused[0],
            )


@dataclasses.dataclass
class Module:
    """A tuned linear in a file.

    Attributes:
      tensors: The file.
      site: The site of the linear.
      name: The module's path in this model.
      file_name: Its path in the model that the file was written from.
      d_in: Its features in.
      d_out: Its features out.
      kernel: Makes its weights `[D, F]`.
      arrays: Its own tensors, by the ends of their names.
    """

    tensors: Tensors
    site: str
    name: str
    file_name: str
    d_in: int
    d_out: int
    kernel: Kernel
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def take(self, end: str, shape: tuple[int, ...]) -> np.ndarray:
        """One of its tensors; zeros in place of one that the file lacks."""
        x = self.arrays.get(end)
        if x is None:
            return self.tensors.take(f"{self.name}.{end}", shape)
        self.tensors.check_shape(f"{self.name}.{end}", x, shape)
        return x


Modules = dict[str, dict[int, Module]]  # by site and layer


def tuned_modules(
    mllm: MLLM, tensors: Tensors, ends: Iterable[str], config: Mapping[str, Any]
) -> Modules:
    """The linears that a file has tensors of, in the order of the model.

    Args:
      mllm: The model.
      tensors: The file; what is found is taken out of it.
      ends: The ends of the names of their tensors.
      config: The content of `adapter_config.json`, which names more of them than it may lack.

    Raises:
      UserError: when the file lacks a linear that its settings name.
    """
    places = linear_places(mllm.config)
    shapes = {f"llm.block.{name}": shape for name, shape in mllm.config.llm.linears().items()}
    if isinstance(mllm.config.vision, VisionConfig):
        linears = mllm.config.vision.linears().items()
        shapes |= {f"vision.block.{name}": shape for name, shape in linears}
    linears = mllm.config.connector_linears().items()
    shapes |= {f"connector.{name}": shape for name, shape in linears}
    found: dict[str, Module] = {}
    for name in [*tensors.left]:
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        module = name.removesuffix(f".{end}")
        if end is None or module not in places:
            continue
        if module not in found:
            site, layer = places[module]
            file_name = tensors.file_names[name].removesuffix(f".{end}")
            kernel = _kernel(mllm, site, layer)
            found[module] = Module(tensors, site, module, file_name, *shapes[site], kernel)
        found[module].arrays[end] = tensors.left.pop(name)
    _check_complete(found, [*places], tensors, config)
    modules: Modules = {}
    vision = mllm.config.vision
    for module, (site, layer) in places.items():
        if module not in found:
            continue
        never = isinstance(vision, VisionConfig) and layer >= vision.used_layers
        if never and site.startswith("vision."):
            tensors.unused.append(module)
        else:
            modules.setdefault(site, {})[layer] = found[module]
    return modules


def _kernel(mllm: MLLM, site: str, layer: int) -> Kernel:
    return lambda: np.asarray(dense_at(mllm, site, layer), np.float32)


def _check_complete(
    found: Mapping[str, Module],
    names: Iterable[str],
    tensors: Tensors,
    config: Mapping[str, Any],
) -> None:
    """Records linears that the settings name beside those that are there, in the same part."""
    renames = {_part(name): (name, module.file_name) for name, module in found.items()}
    for name in names:
        if name in found or _part(name) not in renames:
            continue
        ours, theirs = renames[_part(name)]
        while ours and theirs and ours[-1] == theirs[-1]:
            ours, theirs = ours[:-1], theirs[:-1]
        if is_targeted(config, theirs + name.removeprefix(ours)):
            tensors.missing.append(name)


def _part(name: str) -> str:
    """The tower or the connector that a module is in."""
    return next((part for part in ("vision_tower", "projector") if part in name), "llm")
