"""Answers of a model under many steering vectors, in one pass over the questions.

Axis legend: L layers, D hidden size.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.model import Model
from moresjax.inference.steering import kept_tuning, with_steering
from moresjax.tuning.sites import num_layers

POSITIONS = "last_prompt|generated"
AT_ONCE = 64  # vectors that are held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A vector, and how it steers.

    Attributes:
      name: The vector's name.
      vector: The vector `[D]`.
      layer: The layer; 0 at a site without layers.
      alpha: The strength.
      site: The site.
      positions: The selector of the steered tokens.
    """

    name: str
    vector: np.ndarray
    layer: int
    alpha: float = 1.0
    site: str = "llm.block.out"
    positions: str = POSITIONS

    @property
    def key(self) -> str:
        """A text that tells the trials of a vector apart."""
        return f"{self.name} layer={self.layer} alpha={self.alpha:g} {self.site} {self.positions}"

    @property
    def spec(self) -> str:
        """The tuning that steers, without the vector."""
        return f"steer:site={self.site},positions={self.positions}"

    def rows(self, layers: int) -> np.ndarray:
        """What is added, `[L, D]` with zeros in the other layers, or `[D]` without layers."""
        moved = np.float32(self.alpha) * np.asarray(self.vector, np.float32)
        if not layers:
            return moved
        if not 0 <= self.layer < layers:
            raise UserError(f"vector {self.name} is of layer {self.layer}, the model has {layers}")
        rows = np.zeros((layers, len(moved)), np.float32)
        rows[self.layer] = moved
        return rows


Done = Callable[[Example, "Trial | None", str], None]


def ask_steered(
    model: Model,
    task: BenchmarkTask,
    trials: Sequence[Trial],
    *,
    batch_size: int = 64,
    pending: Callable[[Example, Trial | None], bool] = lambda example, trial: True,
    on_done: Done,
) -> None:
    """Answers every question without steering and under every trial.

    Where nothing else is attached to the model, each row of a batch has its own vector: what a
    question begins with is read once for all of them as far as no vector acts there, and one
    program serves all vectors and strengths. A model with a tuning of its own keeps it and is asked
    with one vector after the other, by one program too.

    Args:
      model: The model; afterwards its tuning is as before.
      task: The questions.
      trials: The vectors.
      batch_size: The rows of a batch.
      pending: Whether the answer of a trial, or without steering (None), is still wanted.
      on_done: Called with every answer as soon as it is known.

    Raises:
      UserError: The questions are answered by ranking choices, or a vector does not fit the model.
    """
    if task.ranks_choices:
        raise UserError(f"steering changes written answers, and {task.name} ranks its choices")
    asked: list[Trial | None] = [None, *trials]
    for group in _groups(asked):
        wanted = [
            (example, trial)
            for example in task.examples
            for trial in group
            if pending(example, trial)
        ]
        if wanted:
            _ask_group(model, task, group, wanted, batch_size, on_done)


def _groups(asked: Sequence[Trial | None]) -> Iterator[list[Trial | None]]:
    """Trials that one tuning can hold; the answers without steering go with the first of them."""
    by_spec: dict[str, list[Trial]] = {}
    for trial in asked:
        if trial is not None:
            by_spec.setdefault(trial.spec, []).append(trial)
    first: list[Trial | None] = [None]
    for trials in by_spec.values():
        size = -(-len(trials) // -(-len(trials) // AT_ONCE))  # groups of one size are one program
        for start in range(0, len(trials), size):
            yield [*first, *trials[start : start + size]]
            first = []
    if first:
        yield first


Wanted = tuple[Example, Trial | None]


def _ask_group(
    model: Model,
    task: BenchmarkTask,
    group: Sequence[Trial | None],
    wanted: Sequence[Wanted],
    batch_size: int,
    on_done: Done,
) -> None:
    trials = [trial for trial in group if trial is not None]
    if not trials:
        _ask(model, task, wanted, batch_size, on_done, None)
        return
    layers = num_layers(trials[0].site, model.config)
    if model.mllm.tuning.methods or model.adapters:
        _ask_in_turn(model, task, trials, wanted, batch_size, on_done)
        return
    with kept_tuning(model):
        model.load_vectors({trial.key: trial.rows(layers) for trial in trials}, trials[0].spec)
        names = [None if trial is None else trial.key for _, trial in wanted]
        _ask(model, task, wanted, batch_size, on_done, names)


def _ask_in_turn(
    model: Model,
    task: BenchmarkTask,
    trials: Sequence[Trial],
    wanted: Sequence[Wanted],
    batch_size: int,
    on_done: Done,
) -> None:
    """Each vector for itself, on top of the model's own tuning."""
    layers = num_layers(trials[0].site, model.config)
    of: dict[str, tuple[Trial | None, list[Wanted]]] = {}
    for example, trial in wanted:
        key = "" if trial is None else trial.key
        of.setdefault(key, (trial, []))[1].append((example, trial))
    with with_steering(model, trials[0].spec) as method:
        for trial, own in of.values():
            rows = (trials[0] if trial is None else trial).rows(layers)
            model.set(method, vector=rows * (trial is not None))
            _ask(model, task, own, batch_size, on_done, None)


def _ask(
    model: Model,
    task: BenchmarkTask,
    wanted: Sequence[Wanted],
    batch_size: int,
    on_done: Done,
    names: Sequence[str | None] | None,
) -> None:
    """Answers, some questions at a time; a question's trials follow each other."""
    size = batch_size * model.service.config.batches_per_chunk
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        known: dict = {}
        rows: dict[str, Row] = {}
        for example, _ in chunk:
            if example.id not in rows:
                asked = example.prompt, example.images, example.id, known
                rows[example.id] = model.prompts.row(*asked, **example.pointed)
        done = model.service.generate_many(
            [rows[example.id] for example, _ in chunk],
            [task.length_limit(example) for example, _ in chunk],
            batch_size=batch_size,
            adapters=None if names is None else names[start : start + size],
        )
        for (example, trial), completion in zip(chunk, done, strict=True):
            on_done(example, trial, model.prompts.text(completion.tokens))
