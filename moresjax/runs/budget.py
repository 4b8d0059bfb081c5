"""How long a run is: from a number of samples or of passes over them to optimizer steps."""

import dataclasses
import logging
from collections.abc import Callable

from moresjax.core.errors import UserError
from moresjax.data.pipeline import bucket_plan, samples_per_row
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.runs.run_config import BUDGET, RunConfig

logger = logging.getLogger(__name__)


def check_budget(config: RunConfig) -> None:
    """Refuses a run whose length is not said exactly once.

    Raises:
      UserError: Names what is given.
    """
    given = [f"{key}={getattr(config, key)}" for key in BUDGET if getattr(config, key)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UserError(f"give one of {', '.join(BUDGET)}: how long the run is; got {found}")


def with_steps(
    config: RunConfig, source: Source, make_processor: Callable[[], Processor]
) -> RunConfig:
    """The configuration with its length in steps.

    The number of samples is exact with batching `pad` and `bucket`, up to the last batch. With
    `pack` it follows from the packing of the run's first windows.

    Example:
      >>> from moresjax.data.sources import make_source
      >>> config = RunConfig(epochs=3, batch_size=32)
      >>> source = make_source("digits", task="text", size=100)
      >>> with_steps(config, source, lambda: None).steps
      10

    Args:
      config: The run's configuration.
      source: The training samples.
      make_processor: Makes the processor of the model, which only packing needs.

    Raises:
      UserError: The length is not said exactly once.
    """
    check_budget(config)
    if config.steps:
        return config
    samples = config.samples or max(round(config.epochs * len(source)), 1)
    steps = steps_of(config, source, samples, make_processor)
    logger.info(
        "%d samples, %.3g passes over %d, are %d steps",
        samples,
        samples / len(source),
        len(source),
        steps,
    )
    return dataclasses.replace(config, steps=steps, samples=0, epochs=0.0)


def steps_of(
    config: RunConfig, source: Source, samples: int, make_processor: Callable[[], Processor]
) -> int:
    """How many steps show so many samples; see `with_steps`."""
    if config.batching == "bucket":
        plan = bucket_plan(source, config.batch_size, config.pack_window, config.seed)
        return plan.batches_until(samples)
    if config.batching != "pack":
        return -(-samples // config.batch_size)
    per_row = samples_per_row(
        source,
        make_processor(),
        max_seq_len=config.max_seq_len,
        images_per_row=config.images_per_row,
        seed=config.seed,
        num_workers=config.num_workers,
        pack_window=config.pack_window,
        on_bad_sample=config.on_bad_sample,
    )
    logger.info("%.3g samples share a row, %.4g a step", per_row, per_row * config.batch_size)
    return max(round(samples / (per_row * config.batch_size)), 1)
