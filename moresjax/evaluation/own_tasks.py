"""Tasks that are files: `questions.jsonl`, and `my.py:NAME` for a task that Python code makes."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import plugin_module
from moresjax.evaluation.files import DataRoot
from moresjax.evaluation.questions import load_questions
from moresjax.evaluation.tasks import BenchmarkTask


def load_own(
    name: str,
    *,
    data_root: DataRoot = None,
    limit: int | None = None,
    split: str | None = None,
    image_root: str | Path | None = None,
) -> list[BenchmarkTask]:
    """The tasks of a file.

    Args:
      name: A path of a JSON or JSON Lines file, or `FILE.py:NAME`, where NAME is a `BenchmarkTask`,
        a list of them, or a function that returns either.
      data_root: Handed to a function that has an argument of this name.
      limit: The same; the first examples are taken in any case.
      split: The same.
      image_root: The same; the folder of the images of a JSON file, by default that of the file.

    Raises:
      UserError: The file is missing or wrong, does not define the name or makes something else, or
        a split or an image root is given to what has none.
    """
    given = {"data_root": data_root, "limit": limit, "split": split, "image_root": image_root}
    if name.endswith((".json", ".jsonl")):
        if split is not None:
            raise UserError(
                f"{name} has no splits; name the tasks that a split is for: --split TASK={split}"
            )
        return [load_questions(name, image_root=image_root, limit=limit)]
    file, _, wanted = name.rpartition(":")
    if not file:
        raise UserError(f"{name} needs the name of a task in it: {name}:NAME")
    names = vars(plugin_module(file))
    if wanted not in names:
        own = [
            key
            for key, value in names.items()
            if isinstance(value, BenchmarkTask)
            or (inspect.isfunction(value) and value.__module__ == names["__name__"])
        ]
        raise choice_error(f"name in {file}", wanted, own)
    tasks = [_checked(task, name) for task in _made(names[wanted], name, given)]
    return [dataclasses.replace(task, examples=task.examples[:limit]) for task in tasks]


def _made(value: Any, name: str, given: dict[str, Any]) -> Sequence[Any]:
    """What a file's name stands for, as a list."""
    known: set[str] = set()
    if callable(value):
        try:
            known = set(inspect.signature(value).parameters)
            value = value(**{key: x for key, x in given.items() if key in known and x is not None})
        except UserError:
            raise
        except Exception as error:  # of the user's own code
            raise UserError(f"{name} fails: {type(error).__name__}: {error}") from error
    for key in ("split", "image_root"):
        if given[key] is not None and key not in known:
            raise UserError(f"{name} takes no {key}; leave --{key.replace('_', '-')} out")
    tasks = value if isinstance(value, list | tuple) else [value]
    if not tasks or not all(isinstance(task, BenchmarkTask) for task in tasks):
        raise UserError(
            f"{name} must be a BenchmarkTask, a list of them or a function that returns one, got "
            f"{type(value).__name__}"
        )
    return tasks


def _checked(task: BenchmarkTask, name: str) -> BenchmarkTask:
    ids = [example.id for example in task.examples]
    if not ids:
        raise UserError(f"task {task.name} of {name} has no examples")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UserError(f"task {task.name} of {name} has two examples with the id {twice!r}")
    return task
