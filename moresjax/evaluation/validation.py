"""The validation data of runs as a task: what a model is asked where no task is named."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.plugins import explain_missing
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.runs.config import read_config
from moresjax.runs.data import build_sources
from moresjax.runs.paths import is_workdir

NAME = "validation"


def validation_task(
    folders: Sequence[str | Path],
    *,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> BenchmarkTask:
    """The questions of runs' validation data, the same for all of them.

    Independent questions about an image are asked each, of a dialogue the first.

    Args:
      folders: The runs' directories.
      limit: The number of questions to keep, the first ones.
      sample: The number to draw instead.
      seed: Seeds the draw.

    Raises:
      UserError: A folder is no run, has no validation data, or others than the first one has.
    """
    configs = {}
    for folder in folders:
        if not is_workdir(Path(folder)):
            raise UserError(f"{folder} is no run, so it has no validation data; give --tasks")
        config = read_config(Path(folder) / "config.json")
        chosen = config.validation
        if not chosen.share and not chosen.data:
            raise UserError(f"run {folder} has no validation data; give --tasks")
        held_out = (chosen.share, config.seed, dict(config.data))
        key = held_out if chosen.share else dict(chosen.data)
        configs[str(folder)] = (key, config)
    (first, (known, config)), *others = configs.items()
    for other, (key, _) in others:
        if key != known:
            raise UserError(f"{first} and {other} have different validation data; give --tasks")
    with explain_missing(config.plugins, first):
        source = build_sources(config)[1]
    assert source is not None
    numbers: Sequence[int] | np.ndarray = range(len(source))
    if sample is not None:
        numbers = np.random.default_rng(seed).permutation(len(source))[: max(sample, 1)]
    samples = (source[int(number)] for number in numbers)
    count = limit if sample is None else sample
    examples = list(islice((e for one in samples for e in _examples(one, first)), count))
    return BenchmarkTask(NAME, examples, benchmark=NAME, split=NAME)


def _examples(sample: Any, run: str) -> Iterator[Example]:
    """The questions of a sample."""
    if not isinstance(sample, Sample):
        raise UserError(f"the validation data of {run} are no conversations; give --tasks")
    for number, turn in enumerate(sample.turns if sample.independent else sample.turns[:1]):
        prompt = sample.context + (turn.question or "")
        if IMAGE_MARK not in prompt:
            prompt = "\n".join([*[IMAGE_MARK] * len(sample.images), prompt]).strip()
        yield Example(f"{sample.id}/{number}", prompt, turn.answer, sample.images)
