"""`moresjax sweep`: one configuration over a grid of settings and several seeds, as ordinary runs.

The runs train by `train_many`; this file says which runs there are, and what they say together.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.core.folders import is_empty, make_folder
from moresjax.core.json_files import write_json
from moresjax.core.locks import locked
from moresjax.evaluation.statistics import mean_with_interval
from moresjax.runs.config import load_config
from moresjax.runs.run_config import InitConfig, RunConfig
from moresjax.training.many import DIVERGED, DONE, Outcome, train_many

# In the directory of a sweep.
SUMMARY = "sweep.json"
WAITING = "waiting"
# Metrics of a run's end that the table shows, where the run has them.
SHOWN = ("loss", "accuracy", "validation_loss", "validation_accuracy", "lmar")

Grid = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
      name: Its folder in the directory of the sweep.
      values: The value of every key of the grid, as text.
      config: Its configuration.
    """

    name: str
    values: Mapping[str, str]
    config: RunConfig


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Values by key, from texts `KEY=A;B`; a value in brackets may contain `;`.

    >>> parse_grid(["optimizer.lr=1e-3;3e-3", "tuning=[lora:targets=q;v];ia3"])
    {'optimizer.lr': ['1e-3', '3e-3'], 'tuning': ['lora:targets=q;v', 'ia3']}

    Raises:
      UserError: for a text of another form, or a key that is given twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        values = re.findall(r"(?:[^;\[]|\[[^]]*\]?)+", rest)
        if not (key and equals and values):
            raise UserError(f"grid {text!r} is not of the form KEY=A;B")
        if key in grid:
            raise UserError(f"grid key {key} is given twice")
        grid[key] = [re.sub(r"^\[(.*)\]$", r"\1", value) for value in values]
    return grid


def sweep_runs(
    config: str, grid: Grid, seeds: int | None = None, overrides: Sequence[str] = ()
) -> list[SweepRun]:
    """The runs of a sweep: every combination of the grid's values with every seed.

    `{seed}` in a path of `init` stands for the run's seed, so that a run can start from the run of
    the same seed in another sweep. Paths with a leading dot start from the directory of the sweep.

    >>> [run.name for run in sweep_runs("digits:stage=llm", {"optimizer.lr": ["1e-3", "3e-3"]}, 2)]
    ['lr=1e-3_seed=0', 'lr=1e-3_seed=1', 'lr=3e-3_seed=0', 'lr=3e-3_seed=1']

    Args:
      config: What `load_config` reads.
      grid: Values by config key.
      seeds: The number of seeds, which count from the configuration's; None: its seed alone.
      overrides: Texts `key=value` for all runs.

    Raises:
      UserError: for a key that does not exist, a value that it cannot have, or two equal runs.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if seeds is not None and "seed" in grid:
        raise UserError("a grid over seed and a number of seeds both say the seeds; give one")
    first = load_config(config, overrides).seed
    numbers = [] if seeds is None else [f"seed={first + number}" for number in range(seeds)]
    runs: list[SweepRun] = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        settings = [f"{key}={value}" for key, value in values.items()]
        for seed in [[number] for number in numbers] or [[]]:
            own = load_config(config, [*overrides, *settings, *seed])
            own = _in_sweep(own, _name([*settings, *seed]))
            for other in runs:
                if dataclasses.replace(other.config, name=own.name) == own:
                    raise UserError(f"runs {other.name} and {own.name} of the grid are the same")
                if other.name == own.name:
                    own = dataclasses.replace(own, name=f"{own.name}_{len(runs)}")
            runs.append(SweepRun(own.name, values, own))
    return runs


def sweep(
    config: str,
    workdir: str | Path,
    *,
    grid: Grid | None = None,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    at_once: int = 0,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Trains all runs of a sweep, each into a folder below `workdir`, and writes `sweep.json`.

    The same call goes on with an interrupted sweep; one with more values or seeds adds runs.

    Example:
      >>> import tempfile
      >>> settings = ["steps=1", "batch_size=8", "tensorboard=False"]
      >>> summary = sweep("digits:stage=llm", tempfile.mkdtemp(), seeds=2, overrides=settings)
      >>> [run["state"] for run in summary["runs"]], list(summary["cells"][0]["loss"])
      (['done', 'done'], ['mean', 'interval95'])

    Args:
      config: What `load_config` reads.
      workdir: The directory of the sweep.
      grid: Values by config key; see `parse_grid`.
      seeds: The number of seeds; see `sweep_runs`.
      overrides: Texts `key=value` for all runs.
      at_once: Runs that train at the same time; see `train_many`.
      allow_pickle: Whether pickles of base parts and adapters may be read.

    Returns:
      What `sweep.json` has: `runs` and `cells`, see `summarize`.

    Raises:
      UserError: for runs that cannot be, or a directory that holds something else.
    """
    runs, folder = sweep_runs(config, grid or {}, seeds, overrides), Path(workdir)
    if folder.exists() and not is_empty(folder) and not (folder / SUMMARY).is_file():
        raise UserError(f"workdir {folder} is not empty and holds no sweep")
    outcomes: dict[Path, Outcome] = {}

    def report(place: Path, outcome: Outcome) -> None:
        outcomes[place] = outcome
        _write(folder, runs, outcomes)

    places: dict[str | Path, RunConfig] = {folder / run.name: run.config for run in runs}
    with locked(folder):
        train_many(
            places,
            at_once=at_once,
            allow_pickle=allow_pickle,
            report=report,
            begin=lambda: _write(folder, runs, outcomes),
        )
    return summarize(folder, runs, outcomes)


def summarize(
    folder: Path, runs: Sequence[SweepRun], outcomes: Mapping[Path, Outcome]
) -> dict[str, Any]:
    """What a sweep has found.

    Returns:
      `runs`: for each its `name`, `values`, `seed`, `state`, `step`, `metrics` and `message`;
      `cells`: for each combination of the grid's values how many of its runs are done, of how many
      (`done`, `of`), and the `mean` of each metric over them with its `interval95` (Student's t;
      None for fewer than two).
    """
    rows, cells = [], defaultdict(list)
    for run in runs:
        outcome = outcomes.get(folder / run.name, Outcome(WAITING))
        result = outcome.result
        row = {
            "name": run.name,
            "values": dict(run.values),
            "seed": run.config.seed,
            "state": outcome.state,
            "step": result.step if result else None,
            "metrics": result.metrics if result else {},
            "message": outcome.message,
        }
        rows.append(row)
        cells[tuple(run.values.items())].append(row)
    return {"runs": rows, "cells": [_cell(dict(key), found) for key, found in cells.items()]}


def table(summary: Mapping[str, Any]) -> str:
    """A sweep's runs and cells as text, with a sentence where no interval can be given."""
    keys = list(summary["cells"][0]["values"])
    metrics = [name for name in SHOWN if any(name in run["metrics"] for run in summary["runs"])]
    lines = [[*keys, "seed", "state", "step", *metrics]]
    for run in summary["runs"]:
        numbers = [run["metrics"].get(name) for name in metrics]
        own = [run["seed"], run["state"], "-" if run["step"] is None else run["step"]]
        lines.append([*run["values"].values(), *map(str, own), *map(_number, numbers)])
    means = [[*keys, "done", *metrics]]
    for cell in summary["cells"]:
        found = [_with_interval(cell.get(name)) for name in metrics]
        means.append([*cell["values"].values(), f"{cell['done']} of {cell['of']}", *found])
    text = f"{_aligned(lines)}\n\nmean over seeds, 95% interval\n{_aligned(means)}"
    for run in summary["runs"]:
        text += f"\n{run['name']}: {run['message']}" if run["state"] == DIVERGED else ""
    if any(cell["done"] < 2 for cell in summary["cells"]):
        text += "\nan interval needs two runs that are done; give --seeds 2 or more"
    return text


def _cell(values: dict[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of one combination of the grid's values."""
    done = [row["metrics"] for row in rows if row["state"] == DONE]
    cell: dict[str, Any] = {"values": values, "done": len(done), "of": len(rows)}
    for name in SHOWN:
        if done and all(name in metrics for metrics in done):
            numbers = [metrics[name] for metrics in done]
            mean, low_high = mean_with_interval(numbers, share=name.endswith("accuracy"))
            cell[name] = {"mean": mean, "interval95": low_high}
    return cell


def _in_sweep(config: RunConfig, name: str) -> RunConfig:
    """A run's configuration one folder below that of the sweep, with its seed in its paths."""

    def moved(place: str) -> str:
        parts = place.replace("{seed}", str(config.seed)).split(";")
        return ";".join(f"../{part}" if part.startswith(".") else part for part in parts)

    return dataclasses.replace(
        config,
        name=name,
        init=InitConfig(**{k: moved(v) for k, v in dataclasses.asdict(config.init).items()}),
        tokenizer=moved(config.tokenizer),
        image_processor=moved(config.image_processor),
    )


def _name(settings: Sequence[str]) -> str:
    """The folder of a run: the last words of its keys, and its values."""
    words = [key.rpartition(".")[2] + "=" + value for key, _, value in map(_split, settings)]
    return re.sub(r"[^A-Za-z0-9.=+_-]+", "-", "_".join(words))[:150] or "run"


def _split(setting: str) -> tuple[str, str, str]:
    return setting.partition("=")


def _write(folder: Path, runs: Sequence[SweepRun], outcomes: Mapping[Path, Outcome]) -> None:
    """Writes the summary so that no half of it is ever seen."""
    make_folder(folder)
    write_json(folder / SUMMARY, summarize(folder, runs, outcomes))


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def _with_interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low_high = found["interval95"]
    ends = f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""
    return _number(found["mean"]) + ends


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
