"""Which export format holds which model: the one place that says so, and its sentences."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.models.mllm import MLLM
from moresjax.tuning.base import Method, WeightDelta
from moresjax.tuning.methods.steer import Steer
from moresjax.weights.edits import unheld
from moresjax.weights.export import hf_config, tinyllava_config
from moresjax.weights.pyreft import METHOD_NAMES, SITE
from moresjax.weights.steering import unnoted

# In the order in which they are recommended.
FORMATS = ("hf", "merged", "tinyllava", "adapter", "peft", "pyreft")
ADAPTER_FORMATS = ("adapter", "peft", "pyreft")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and what else of it trained.

    Attributes:
      mllm: The model with its tuning.
      also_train: Patterns of parameters outside the tuning that trained and that the model has.
    """

    mllm: MLLM
    also_train: tuple[str, ...] = ()

    @classmethod
    def of(cls, mllm: MLLM, also_train: Sequence[str]) -> "Trained":
        """The same without patterns that no parameter of the model has."""
        names = [*named_parameters(mllm)]
        own = (p for p in also_train if any(matches(name, p) for name in names))
        return cls(mllm, tuple(own))

    @property
    def methods(self) -> list[Method]:
        """The methods with parameters of their own, which no weights of the model hold."""
        tuning = self.mllm.tuning
        return [method for key, method in tuning.methods if key in tuning.params]

    @property
    def trains(self) -> tuple[str, ...]:
        """Patterns of the model's own weights that trained with a method or beside it."""
        found = (path for _, method in self.mllm.tuning.methods for path in method.trains)
        return (*found, *self.also_train)


@contextlib.contextmanager
def checked(format: str, model: Trained) -> Iterator[None]:
    """Where a model is written: refuses what the format cannot hold.

    Raises:
      UserError: that says what the format, or its writer, has no place for, and which format holds
        all of it.
    """
    try:
        if reason := _refusal(format, model):
            raise UserError(reason)
        yield
    except UserError as error:
        others = (other for other in FORMATS if other not in (format, "peft"))
        other = next((other for other in others if not _refusal(other, model)), "")
        raise UserError(f"{error}; use format {other}" if other else str(error)) from None


def _refusal(format: str, model: Trained) -> str:
    """Why a format does not hold a model; empty if it does."""
    tuning = model.mllm.tuning
    if tuning.adapters:
        return f"format {format} holds a single tuning, the model {len(tuning.adapters)} adapters"
    try:
        what = _CHECKS[format](model)
    except UserError as error:
        return str(error)
    return f"format {format} has no place for {what}" if what else ""


def _hf(model: Trained) -> str:
    hf_config(model.mllm.config)
    return _edits(model.mllm)


def _merged(model: Trained) -> str:
    hf_config(model.mllm.config)
    return _edits(model.mllm, lambda method: not _can_merge(method))


def _tinyllava(model: Trained) -> str:
    tinyllava_config(model.mllm.config)
    left = [method for method in model.methods if not _can_merge(method)]
    if len(left) > 1:
        return " and ".join(method.name for method in left)
    return unnoted(left[0]) if left else ""


def _adapter(model: Trained) -> str:
    constant = [method for method in model.methods if method.constant]
    given = [method for method in constant if not (isinstance(method, Steer) and method.vector)]
    trained = [*model.trains, *(method for method in model.methods if not method.constant)]
    if given or (constant and not trained):
        return f"the given vector of {constant[0].name}"
    return "" if trained else "a model of which nothing trained"


def _peft(model: Trained) -> str:
    """Nothing: what peft has no place for, its writer says."""
    return ""


def _pyreft(model: Trained) -> str:
    tuning = model.mllm.tuning
    if not model.methods:
        return "a model without edits"
    for key, method in tuning.methods:
        if key not in tuning.params:
            return f"trained weights of {method.trains[0]}"
        if method.name not in METHOD_NAMES or [*tuning.params[key]] != [SITE]:
            return f"{method.name} at {', '.join(tuning.params[key])}"
    return _beside(model)


def _beside(model: Trained) -> str:
    """What trained beside a tuning, other than the connector."""
    return next((f"trained weights of {p}" for p in model.also_train if p != "connector"), "")


_CHECKS: dict[str, Callable[[Trained], str]] = {
    "hf": _hf,
    "merged": _merged,
    "tinyllava": _tinyllava,
    "adapter": _adapter,
    "peft": _peft,
    "pyreft": _pyreft,
}


def _edits(mllm: MLLM, keep: Callable[[Method], bool] = lambda method: True) -> str:
    """What of some of the methods cannot lie beside weights as edits."""
    tuning = mllm.tuning
    own = [(m, tuning.params[key]) for key, m in tuning.methods if key in tuning.params and keep(m)]
    return next((what for method, sites in own if (what := unheld(method, sites))), "")


def _can_merge(method: Method) -> bool:
    return isinstance(method, WeightDelta) and type(method).merge is not WeightDelta.merge
