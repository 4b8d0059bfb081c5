"""What a model is steered from and to: steering tasks, and their registry.

A task tells the answers to steer away from and those to steer to. That chooses the states that a
vector is made of, and counts what the vector does. `NAME` or `NAME:ARGUMENT` names one, such as
`answers:yes>no`; a plug-in registers its own with `@steering_task("name")`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moresjax.analysis.states import States
from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import add_entry
from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.vqa import normalize_vqa


class SteeringTask:
    """Which answers are the source's and which the target's, and what to measure besides.

    >>> class Shout(SteeringTask):
    ...     name = "shout"
    ...
    ...     def is_target(self, answer):
    ...         return answer.isupper()
    >>> Shout().is_source("hello"), Shout().is_target("HELLO")
    (True, True)

    Attributes:
      name: The task's name in results.
    """

    name: str = "steering"

    def is_source(self, answer: str) -> bool:
        """Whether an answer is one to steer away from; default: any that is not the target's."""
        return not self.is_target(answer)

    def is_target(self, answer: str) -> bool:
        """Whether an answer is one to steer to."""
        raise NotImplementedError

    def source_state(self, row: Mapping[str, Any]) -> bool:
        """Whether a state is one of the source's, from its row in a store's index."""
        return self.is_source(row.get("prediction") or "")

    def target_state(self, row: Mapping[str, Any]) -> bool:
        """Whether a state is one of the target's, from its row in a store's index."""
        return self.is_target(row.get("prediction") or "")

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Is shown the rows of all states before any of them is chosen."""

    def learn_types(self, examples: Sequence[Example]) -> None:
        """Is shown questions whose true answers tell the types of answers, after `learn`."""

    def normalize(self, answer: str) -> str:
        """An answer as it is counted and compared."""
        return normalize_vqa(answer)

    def metrics(
        self, examples: Sequence[Example], baseline: Sequence[str], steered: Sequence[str]
    ) -> dict[str, Any]:
        """Further numbers about the answers to some questions, by name.

        Args:
          examples: The questions.
          baseline: The answers without steering.
          steered: The answers with it.
        """
        return {}


class SentenceTask(SteeringTask):
    """A task about whole sentences, such as captions."""

    def normalize(self, answer: str) -> str:
        """A sentence up to case and surrounding blanks."""
        return answer.strip().lower()


Maker = Callable[[str], SteeringTask]
_TASKS: dict[str, Maker] = {}


def steering_task(name: str) -> Callable[[Maker], Maker]:
    """A decorator that registers what makes a steering task of the text behind its name.

    >>> @steering_task("shout")
    ... def make(argument):
    ...     return SteeringTask()
    >>> parse_steering_task("shout").name
    'steering'

    Args:
      name: The name in `--steer` and `parse_steering_task`.

    Raises:
      UserError: The name belongs to another task.
    """

    def register(make: Maker) -> Maker:
        add_entry(_TASKS, "steering task", name, make)
        return make

    return register


def parse_steering_task(text: str) -> SteeringTask:
    """The steering task `NAME` or `NAME:ARGUMENT`.

    >>> parse_steering_task("answers:yes>no").is_target("No.")
    True

    Raises:
      UserError: There is no such task, or the argument does not fit it.
    """
    from moresjax.evaluation import steering  # noqa: F401 -- its files register themselves

    load_plugins()
    name, _, argument = text.partition(":")
    if name not in _TASKS:
        raise choice_error("steering task", name, sorted(_TASKS))
    return _TASKS[name](argument)


def no_argument(name: str, argument: str) -> None:
    """Refuses text behind the name of a task that takes none."""
    if argument:
        raise UserError(f"the steering task {name} takes no argument, got {argument!r}")


def split_states(states: States, task: SteeringTask) -> tuple[States, States]:
    """The states of a task's source and target among those of one store that were found.

    >>> import numpy as np
    >>> rows = [{"prediction": "Yes"}, {"prediction": "no"}, {"prediction": "2"}]
    >>> store = States.from_arrays({("llm.block.out", 3): np.ones((3, 2))}, rows)
    >>> [len(side) for side in split_states(store, parse_steering_task("answers:yes>no"))]
    [1, 1]

    Raises:
      UserError: A side has no states.
    """
    task.learn(states.index)
    sides = []
    for side, belongs in (("source", task.source_state), ("target", task.target_state)):
        kept = [n for n, row in enumerate(states.index) if states.found[n] and belongs(row)]
        if not kept:
            raise UserError(
                f"none of the {len(states)} states is the {side}'s of {task.name}: see the "
                "predictions in their index"
            )
        sides.append(states.take(kept))
    return sides[0], sides[1]
