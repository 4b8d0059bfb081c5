"""moresjax: train, evaluate and explain multimodal LLMs by editing representations.

    import moresjax as mj
    mj.train("digits:stage=finetune,tuning=mores", "runs/mores")
    model = mj.load("runs/mores")
    model.generate("what is the largest ?", "scene.png")

Every name is loaded on first use: `import moresjax` is quick, and a command that only counts
parameters does not wait for the data and generation stacks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moresjax._version import __version__

if TYPE_CHECKING:
    from moresjax import configs
    from moresjax.core.errors import UserError
    from moresjax.evaluation.run import evaluate
    from moresjax.evaluation.steering.run import steer
    from moresjax.generation.config import EngineConfig
    from moresjax.generation.sampling import Sampling
    from moresjax.generation.scoring import ContinuationScore
    from moresjax.inference import analyze
    from moresjax.inference.chat import Chat
    from moresjax.inference.load import load
    from moresjax.inference.model import Model
    from moresjax.inference.prompts import Answer
    from moresjax.reports.report import report
    from moresjax.runs.config import load_config
    from moresjax.training.loop import train
    from moresjax.training.many import train_many

# The module of every public name; an empty name stands for the module itself.
_PLACES = {
    "Answer": ("moresjax.inference.prompts", "Answer"),
    "Chat": ("moresjax.inference.chat", "Chat"),
    "ContinuationScore": ("moresjax.generation.scoring", "ContinuationScore"),
    "EngineConfig": ("moresjax.generation.config", "EngineConfig"),
    "Model": ("moresjax.inference.model", "Model"),
    "Sampling": ("moresjax.generation.sampling", "Sampling"),
    "UserError": ("moresjax.core.errors", "UserError"),
    "analyze": ("moresjax.inference.analyze", ""),
    "configs": ("moresjax.configs", ""),
    "evaluate": ("moresjax.evaluation.run", "evaluate"),
    "load": ("moresjax.inference.load", "load"),
    "load_config": ("moresjax.runs.config", "load_config"),
    "report": ("moresjax.reports.report", "report"),
    "steer": ("moresjax.evaluation.steering.run", "steer"),
    "train": ("moresjax.training.loop", "train"),
    "train_many": ("moresjax.training.many", "train_many"),
}

__all__ = [
    "Answer",
    "Chat",
    "ContinuationScore",
    "EngineConfig",
    "Model",
    "Sampling",
    "UserError",
    "__version__",
    "analyze",
    "configs",
    "evaluate",
    "load",
    "load_config",
    "report",
    "steer",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'moresjax' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
