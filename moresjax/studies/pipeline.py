"""The three stages on the digits world, whole for every seed, in folders that studies share.

    OUT/seed0/{llm,vit,pretrain}     stages 0 and 1
    OUT/seed0/finetune/METHOD        stage 2, with its evaluations inside
    OUT/seed0/VARIANT/...            the same with other settings, where a study has some

Every run is an ordinary one; what is there is not trained or asked again.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.core.errors import UserError
from moresjax.core.json_files import read_object
from moresjax.evaluation.benchmarks.digits import DEFAULT_LIMIT
from moresjax.evaluation.results import RESULTS, write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import BenchmarkTask, load_tasks
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.count import count_parameters
from moresjax.runs.architecture import model_config
from moresjax.runs.config import read_config
from moresjax.training.many import DONE, train_many
from moresjax.training.prepare import RESULT as TRAINED
from moresjax.training.prepare import TrainResult

ZERO_SHOT = "zero-shot"
STAGES = ("llm", "vit", "pretrain")
FAST = {
    "steps": 4,
    "batch_size": 8,
    "model.llm.num_layers": 2,
    "model.llm.hidden_size": 32,
    "model.llm.intermediate_size": 32,
    "model.llm.num_heads": 2,
    "model.vision.num_layers": 1,
    "model.vision.hidden_size": 16,
    "model.vision.intermediate_size": 16,
    "model.vision.num_heads": 2,
}


def slug(name: str) -> str:
    """A method's name as a folder name.

    >>> slug("mores r=4")
    'mores-r-4'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """Runs of stage 2, one for every seed.

    Attributes:
      name: The name of the method.
      tuning: Its tuning spec.
      settings: Config keys beside those of the recipe, and their values.
      stage: The recipe's stage: `finetune`, or one that starts from runs of it.
    """

    name: str
    tuning: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stage: str = "finetune"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A pipeline whose stages have settings beside those of the recipe.

    Attributes:
      name: Its folder.
      settings: By stage (`llm`, `vit`, `pretrain`, `finetune`) config keys and their values; a
        stage that is not named is that of the plain pipeline.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The runs of a demo or of studies.

    Attributes:
      out: The folder of all seeds.
      seeds: The seeds; each is that of all three stages.
      split: The handwriting that is scored; `val` is what the recipe was tuned on.
      fast: Runs a few steps of everything on tiny models, to test the plumbing.
      scenes: Scenes that are asked about in each family of questions.
      variant: Settings of its own; None: the recipe's alone.
    """

    out: Path
    seeds: Sequence[int]
    split: str = "test"
    fast: bool = False
    scenes: int = DEFAULT_LIMIT
    variant: Variant | None = None

    @property
    def limit(self) -> int:
        """The scenes that are asked about: `scenes`, a few of them where `fast`."""
        return min(self.scenes, 20) if self.fast else self.scenes

    def folder(self, seed: int, name: str) -> Path:
        """The run of a stage, or of a method in stage 2; that of zero-shot is stage 1."""
        home = self.out / f"seed{seed}"
        name = STAGES[-1] if name == ZERO_SHOT else name
        if self.variant and (name not in STAGES or name in self.variant.settings):
            home /= self.variant.name
        return home / name if name in STAGES else home / "finetune" / slug(name)

    def train_stages(self) -> dict[str, list[TrainResult]]:
        """Stages 0 and 1 of every seed, several runs at a time; by stage the result of each seed.

        Raises:
          UserError: A run diverged, or the process was asked to stop.
        """
        results: dict[str, list[TrainResult]] = {}
        for group in (STAGES[:-1], STAGES[-1:]):
            runs = {
                self.folder(seed, stage): self._config(stage, seed, stage, stage)
                for stage in group
                for seed in self.seeds
            }
            done = self._train(runs)
            for stage in group:
                results[stage] = [done[self.folder(seed, stage)] for seed in self.seeds]
        return results

    def finetune(self, methods: Sequence[Finetuning]) -> dict[str, list[TrainResult]]:
        """Stage 2 with every method and seed, several runs at a time; by name those of each seed.

        Raises:
          UserError: A run diverged, or the process was asked to stop.
        """
        done: dict[Path, TrainResult] = {}
        for stage in dict.fromkeys(method.stage for method in methods):
            runs = {
                self.folder(seed, method.name): self._finetuning(method, seed)
                for method in methods
                for seed in self.seeds
                if method.stage == stage
            }
            done |= self._train(runs)
        return {
            method.name: [done[self.folder(seed, method.name)] for seed in self.seeds]
            for method in methods
        }

    def model(self, seed: int, name: str) -> Model:
        """A trained model."""
        return load(self.folder(seed, name), template=recipe.TEMPLATE)

    def trainable_in_llm(self, tuning: str) -> int:
        """The parameters that a method trains in the LLM."""
        config = model_config(read_config(self.folder(self.seeds[0], STAGES[-1]) / "config.json"))
        return count_parameters(config, tuning).trainable_in_llm

    def scores(
        self,
        seed: int,
        name: str,
        model: Model | None = None,
        *,
        benchmark: str = "digits",
        only: str = "",
    ) -> dict[str, Any]:
        """Accuracy of a model on the pipeline's handwriting, on `digits` with its attention.

        Args:
          seed: The seed.
          name: The method.
          model: The model, where it is loaded already.
          benchmark: What it is asked.
          only: The only task of the benchmark that it is asked; empty: all.

        Returns:
          What `results.json` of the evaluation has; one that is there is read.
        """
        folder, whole = self.folder(seed, name), (benchmark, only) == ("digits", "")
        place = f"eval-{self.split}" if whole else f"eval-{self.split}-{only or benchmark}"
        path, trained = folder / place / RESULTS, folder / TRAINED
        every = _tasks(benchmark, self.limit, self.split)
        tasks = [task for task in every if only in ("", task.name)]
        if path.is_file() and path.stat().st_mtime > trained.stat().st_mtime:
            known = read_object(path)
            sizes = {task: entry["n"] for task, entry in known["scores"].items()}
            if sizes == {task.name: len(task.examples) for task in tasks}:
                return known
        model = model or self.model(seed, name)
        found = evaluate(_merged(model), tasks, attention=whole, title=f"{name}, seed {seed}")
        write_results(found, path.parent, split=self.split, tuning=model.tuning)
        return read_object(path)

    def accuracy(self, names: Iterable[str]) -> dict[str, list[float]]:
        """By method the mean accuracy of every seed on `digits`."""
        return {
            name: [float(self.scores(seed, name)["mean_accuracy"]) for seed in self.seeds]
            for name in names
        }

    def _finetuning(self, method: Finetuning, seed: int) -> ConfigDict:
        stage = f"{method.stage},tuning={method.tuning}"
        config = self._config(stage, seed, method.stage, method.name)
        config.update_from_flattened_dict(dict(method.settings))
        return config

    def _config(self, stage: str, seed: int, kind: str, name: str) -> ConfigDict:
        """The recipe's configuration of a stage, with the variant's settings, in its folder."""
        config = recipe.get_config(f"stage={stage},seed={seed}")
        folder = self.folder(seed, name)
        earlier = {
            part: os.path.relpath(self.folder(seed, Path(source).name), folder)
            for part, source in config.to_dict()["init"].items()
            if source.startswith(".")
        }
        config.update({"init": earlier})
        if self.variant:
            settings = self.variant.settings.get(kind, {})
            config.update_from_flattened_dict(dict(settings))
        return config

    def _fast(self, config: ConfigDict) -> dict[str, Any]:
        """The settings of a few steps of a tiny model."""
        model = config.to_dict()["model"]
        absent = tuple(f"model.{part}." for part in ("llm", "vision") if not model[part])
        return {key: value for key, value in FAST.items() if not key.startswith(absent)}

    def _train(self, runs: Mapping[Path, ConfigDict]) -> dict[Path, TrainResult]:
        for folder, config in runs.items():
            config.name = folder.name
            if self.fast:
                config.update_from_flattened_dict(self._fast(config))
        results: dict[Path, TrainResult] = {}
        # A run has the same bits whatever other ranks are trained beside it.
        for folder, outcome in train_many({**runs}, share_ranks=False).items():
            if outcome.state != DONE or outcome.result is None:
                raise UserError(f"{folder} {outcome.state}: {outcome.message or 'start it again'}")
            results[folder] = outcome.result
        return results


@functools.lru_cache(maxsize=4)
def _tasks(benchmark: str, limit: int, split: str) -> tuple[BenchmarkTask, ...]:
    """What the models of a study are asked, which is the same for all of them."""
    return tuple(load_tasks([benchmark], None, limit, split))


def _merged(model: Model) -> Model:
    """The model with its tuning in its weights, where the method allows it (Adapter does not)."""
    try:
        return model.merge()
    except UserError:
        return model
