"""Benchmarks and their registry.

A benchmark is a function `load(data_root, limit, split) -> list[BenchmarkTask]` under a name. The
built-in ones are the files of `moresjax.evaluation.benchmarks`; a plug-in registers its own with
`@benchmark(name)` in any file that is imported before the evaluation.

An `Example` knows its prompt, images and answer; a `BenchmarkTask` knows how predictions become a
score (`scoring.py`), and in which format the benchmark's own tools save and expect predictions
(`files.py`).
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moresjax.core.errors import UnknownName, UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import add_entry
from moresjax.data.processor_facts import short_hash
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import LETTERS, DataRoot, ResultReader, result_reader
from moresjax.evaluation.metrics.choices import lowest_loss
from moresjax.evaluation.presets import PRESETS, expand_presets
from moresjax.evaluation.scoring import Scorer, example_scorer
from moresjax.generation.sampling import Sampling

_read_own = result_reader("id", "prediction")


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """Questions, answered in free text or by ranking their choices, with one score.

    >>> from moresjax.evaluation.examples import Example
    >>> task = BenchmarkTask("colours", [Example("1", "What colour is snow?", "white")])
    >>> task.scorer(task.examples, ["White"]).value
    1.0

    Attributes:
      name: The task's name in results; a benchmark can have several tasks.
      examples: The questions, all of which have choices or none.
      max_new_tokens: The length limit of an answer.
      scorer: Turns predictions into a score.
      read: Reads a result file in the benchmark's own format.
      submissions: By file name, a function from predictions by id to the file's content: what the
        benchmark's server or its own tool takes.
      benchmark: The name that the task was loaded under.
      split: The split of the data that the examples are of; None where there are no splits.
      temperature: The temperature that written answers are drawn at, with seed 0, where the
        evaluation does not draw answers itself; 0 chooses the likeliest tokens.
    """

    name: str
    examples: Sequence[Example]
    _: dataclasses.KW_ONLY
    max_new_tokens: int = 128
    scorer: Scorer = dataclasses.field(default_factory=example_scorer)
    read: ResultReader = _read_own
    submissions: Mapping[str, Callable[[Mapping[str, str]], str]] = dataclasses.field(
        default_factory=dict
    )
    benchmark: str = ""
    split: str | None = None
    temperature: float = 0.0

    def sampling(self, wanted: Sampling) -> Sampling:
        """How tokens of answers are chosen, from how the evaluation chooses them."""
        if wanted.temperature or not self.temperature or self.ranks_choices:
            return wanted
        return dataclasses.replace(wanted, temperature=self.temperature, seed=0)

    def length_limit(self, example: Example) -> int:
        """The most tokens of the answer to one of the examples."""
        return example.max_new_tokens or self.max_new_tokens

    @property
    def ranks_choices(self) -> bool:
        """Whether the model ranks the examples' choices instead of writing an answer."""
        return bool(self.examples and self.examples[0].choices)


def choice_letter(log_likelihoods: Sequence[float]) -> str:
    """The letter of the likeliest choice; the first of equal ones.

    >>> choice_letter([-3.0, -2.0, -2.0])
    'B'
    """
    return LETTERS[lowest_loss([-value for value in log_likelihoods])]


Loader = Callable[..., list[BenchmarkTask]]
_BENCHMARKS: dict[str, Loader] = {}


def register_benchmark(name: str, load: Loader) -> None:
    """Makes a benchmark available to `evaluate` and `moresjax evaluate` under a name.

    >>> from moresjax.evaluation.examples import Example
    >>> def load(data_root=None, limit=None):
    ...     questions = [Example("1", "What colour is snow?", "white")]
    ...     return [BenchmarkTask("colours", questions[:limit])]
    >>> register_benchmark("colours", load)
    >>> [task.name for task in load_benchmark("colours")]
    ['colours']

    Args:
      name: The name in `tasks=` and `--tasks`.
      load: Called with `data_root` and `limit`, and with `split` where the user names one.

    Raises:
      UserError: The name belongs to a preset or to another benchmark.
    """
    if name in PRESETS:
        raise UserError(f"the benchmark name {name!r} is taken by a preset; choose another")
    add_entry(_BENCHMARKS, "benchmark", name, load)


def benchmark(name: str) -> Callable[[Loader], Loader]:
    """A decorator that registers a benchmark's `load` function; see `register_benchmark`."""

    def register(load: Loader) -> Loader:
        register_benchmark(name, load)
        return load

    return register


def benchmark_names() -> list[str]:
    """The names of all benchmarks, sorted."""
    return sorted(_registry())


def benchmark_loader(name: str) -> Loader:
    """The `load` function of a benchmark.

    Raises:
      UserError: There is no such benchmark.
    """
    registry = _registry()
    if name not in registry:
        raise unknown_task(name)
    return registry[name]


def unknown_task(name: str, near: Sequence[str] = ()) -> UnknownName:
    """The error for a name that is no benchmark, preset or task of `lm_eval`.

    Args:
      name: The name.
      near: Tasks of `lm_eval` with names like it.
    """
    such = f" (such as {', '.join(near)})" if near else ""
    besides = f"FILE.jsonl, FILE.py:NAME or a task of lm_eval{such}"
    return choice_error("task", name, [*benchmark_names(), *PRESETS], besides)


def _registry() -> dict[str, Loader]:
    # The built-in benchmarks register themselves on import.
    from moresjax.evaluation import benchmarks  # noqa: F401

    load_plugins()
    return _BENCHMARKS


def is_file(name: str) -> bool:
    """Whether the name of a task is a file with questions of one's own, or with code.

    >>> is_file("mine/questions.jsonl"), is_file("my.py:task"), is_file("gqa")
    (True, True, False)
    """
    return name.endswith((".json", ".jsonl", ".py")) or ".py:" in name


def default_split(name: str) -> str | None:
    """The split that a benchmark reads where none is named; None where it has no splits.

    >>> default_split("digits"), default_split("questions.jsonl")
    ('test', None)
    """
    if is_file(name) or name not in _registry():
        return None
    found = inspect.signature(benchmark_loader(name)).parameters.get("split")
    return None if found is None else found.default


def load_benchmark(
    name: str,
    *,
    data_root: DataRoot = None,
    limit: int | None = None,
    split: str | None = None,
    image_root: str | Path | None = None,
) -> list[BenchmarkTask]:
    """The tasks of a benchmark or a file; without a split, those of its default one.

    Raises:
      UserError: The name is unknown, or files are missing or not as published.
    """
    chosen = {} if split is None else {"split": split}
    if is_file(name):
        from moresjax.evaluation.own_tasks import load_own  # makes tasks: it needs their class

        tasks = load_own(name, data_root=data_root, limit=limit, image_root=image_root, **chosen)
    else:
        tasks = benchmark_loader(name)(data_root=data_root, limit=limit, **chosen)
    own = {"benchmark": name, "split": split or default_split(name)}
    return [dataclasses.replace(task, **own) for task in tasks]


def load_tasks(
    names: Sequence[str],
    data_root: DataRoot,
    limit: int | None,
    split: str | None,
    image_root: str | Path | None = None,
) -> list[BenchmarkTask]:
    """The tasks of several benchmarks, presets and files.

    Args:
      names: Names of benchmarks and presets, and files (see `own_tasks`).
      data_root: The folder of the official files.
      limit: The most examples per task.
      split: One split for all benchmarks, or `NAME=SPLIT,NAME=SPLIT` for some.
      image_root: The folder that images of files start from.

    Raises:
      UserError: The limit is below 1, or a name, a split or a file is wrong.
    """
    tasks, missing = load_available_tasks(names, data_root, limit, split, image_root)
    for reason in missing.values():
        raise UserError(reason)
    return tasks


def load_available_tasks(
    names: Sequence[str],
    data_root: DataRoot,
    limit: int | None,
    split: str | None,
    image_root: str | Path | None = None,
) -> tuple[list[BenchmarkTask], dict[str, str]]:
    """Like `load_tasks`, but a preset goes on without benchmarks whose data are not at hand.

    Returns:
      The tasks, and by benchmark why it has none.

    Raises:
      UserError: As `load_tasks` does, also for missing data of a benchmark that is named itself.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    expanded = expand_presets(names)
    if image_root is not None and not any(map(is_file, expanded)):
        raise UserError("an image root is for files of questions, and no task is one; leave it out")
    splits = _splits(split, expanded)
    tasks, missing = [], {}
    for name in expanded:
        try:
            own = {"split": splits.get(name), "image_root": image_root}
            tasks += load_benchmark(name, data_root=data_root, limit=limit, **own)
        except UnknownName:
            raise
        except UserError as error:
            if name in names:
                raise
            missing[name] = str(error)
    check_names(tasks)
    return tasks, missing


def check_names(tasks: Sequence[BenchmarkTask]) -> None:
    """Refuses two tasks of one name, one of which would be lost."""
    named: dict[str, str] = {}
    for task in tasks:
        if task.name in named:
            raise UserError(
                f"{named[task.name]} and {task.benchmark} both have a task {task.name!r}; name one "
                "otherwise"
            )
        named[task.name] = task.benchmark


def draw_examples(
    tasks: Sequence[BenchmarkTask], sample: int | None, seed: int, limit: int | None = None
) -> list[BenchmarkTask]:
    """The tasks with so many examples each, drawn at random and in their order; None: all of them.

    Args:
      tasks: The tasks.
      sample: The number of examples to draw.
      seed: Seeds the draws; those of tasks with equally many examples are alike.
      limit: The limit that the tasks were loaded with.

    Raises:
      UserError: The sample is below 1 or comes with a limit, or the seed is negative.
    """
    if sample is None:
        return list(tasks)
    if sample < 1 or seed < 0:
        raise UserError(f"sample must be at least 1 and seed at least 0, got {sample} and {seed}")
    if limit is not None:
        raise UserError("limit takes the first examples and sample draws some; give one of them")
    drawn = []
    for task in tasks:
        count = len(task.examples)
        chosen = np.random.default_rng(seed).permutation(count)[:sample]
        examples = [task.examples[number] for number in sorted(chosen)]
        drawn.append(dataclasses.replace(task, examples=examples))
    return drawn


def questions_hash(tasks: Sequence[BenchmarkTask]) -> str:
    """Twelve hexadecimal digits that tell the questions of tasks, with their answers, apart.

    >>> from moresjax.evaluation.examples import Example
    >>> tasks = [BenchmarkTask("snow", [Example(x, "What colour is snow?")]) for x in "12"]
    >>> questions_hash(tasks[:1]) == questions_hash(tasks[1:]), len(questions_hash(tasks))
    (False, 12)
    """
    asked = [[t.name, e.id, e.prompt, e.answer, e.choices] for t in tasks for e in t.examples]
    return short_hash(json.dumps(asked, default=str))


def limit_answers(tasks: Sequence[BenchmarkTask], tokens: int | None) -> list[BenchmarkTask]:
    """The tasks with answers of so many tokens at most; None: with their own limits.

    Every example has the limit as its own, so that answers of another limit are asked again. Tasks
    that rank choices stay as they are.

    >>> from moresjax.evaluation.examples import Example
    >>> tasks = [BenchmarkTask("snow", [Example("1", "What colour is snow?", "white")])]
    >>> [task.length_limit(task.examples[0]) for task in limit_answers(tasks, 5)]
    [5]

    Args:
      tasks: The tasks.
      tokens: The limit.

    Raises:
      UserError: The limit is below 1.
    """
    if tokens is None:
        return list(tasks)
    if tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {tokens}")
    return [
        task
        if task.ranks_choices
        else dataclasses.replace(
            task,
            max_new_tokens=tokens,
            examples=[dataclasses.replace(e, max_new_tokens=tokens) for e in task.examples],
        )
        for task in tasks
    ]


def named_splits(split: str) -> dict[str, str]:
    """The splits of `BENCHMARK=SPLIT,...` by benchmark; empty for one split for all.

    >>> named_splits("digits=val,gqa=train"), named_splits("val")
    ({'digits': 'val', 'gqa': 'train'}, {})
    """
    pairs = [pair.partition("=") for pair in split.split(",")] if "=" in split else []
    return {name: chosen for name, _, chosen in pairs}


def _splits(split: str | None, names: Sequence[str]) -> dict[str, str]:
    """The split of every benchmark that does not use its default one."""
    if split is None or "=" not in split:
        return {} if split is None else dict.fromkeys(names, split)
    splits = named_splits(split)
    for name in splits:
        if name not in names:
            raise choice_error("task of a split", name, names)
    return splits
