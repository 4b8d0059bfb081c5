"""Loss landscapes of runs: the same samples and grid for all of them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from moresjax._version import __version__
from moresjax.analysis.landscape import (
    NORMALIZE,
    curvature,
    draw_directions,
    flatness,
    is_scale_invariant,
    join_chunks,
    losses_on_plane,
    make_axis,
)
from moresjax.core.errors import UserError, choice_error
from moresjax.core.locks import one_writer
from moresjax.data.processor_facts import processor_facts, short_hash
from moresjax.data.sources import Source
from moresjax.data.subset import Subset
from moresjax.evaluation.landscape.loss import RunLoss, all_batches
from moresjax.evaluation.landscape.store import CURVATURE, PointStore
from moresjax.evaluation.statistics import mean_with_interval
from moresjax.runs.config import read_config
from moresjax.runs.data import build_sources
from moresjax.runs.paths import is_workdir
from moresjax.runs.run_config import RunConfig
from moresjax.runs.workdir import load_workdir
from moresjax.sharding.mesh import make_mesh, shard_params
from moresjax.training.objectives import get_objective
from moresjax.training.step import split_model
from moresjax.weights.fingerprint import exact_fingerprint, fingerprint

SPLITS = ("validation", "training")
MEASURES = ("centre", "share_twice", "share_above", "maximum_near", "curvature")
MIN_PAIRS = 3  # fewer are no evidence
NO_LENGTH = (
    "normalize=none means nothing here: some parameters are made orthonormal, so that the loss "
    "does not depend on their lengths, and how far a step of 1 goes is arbitrary"
)


@dataclasses.dataclass(frozen=True)
class LandscapeOptions:
    """How landscapes are measured.

    Attributes:
      points: P of a grid of P x P points.
      span: The coordinates go from minus this to this.
      pairs: Pairs of directions.
      samples: Samples that the loss is of.
      normalize: `filter`, `layer` or `none` (see `draw_directions`).
      seed: Seeds directions and samples.
      split: `validation` or `training` samples; empty: the first where there are any.
      batch_size: Rows of a batch.
      chunk: Points that one call of the program takes and that are kept together.
    """

    points: int = 41
    span: float = 1.0
    pairs: int = 3
    samples: int = 256
    normalize: str = "filter"
    seed: int = 0
    split: str = ""
    batch_size: int = 32
    chunk: int = 16

    def __post_init__(self) -> None:
        make_axis(self.points, self.span)
        for name in ("pairs", "samples", "batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.normalize not in NORMALIZE:
            raise choice_error("normalize", self.normalize, NORMALIZE)
        if self.split and self.split not in SPLITS:
            raise choice_error("split of a landscape", self.split, SPLITS)

    @property
    def axis(self) -> Float[np.ndarray, " P"]:
        """The coordinates of the grid."""
        return make_axis(self.points, self.span)


@one_writer
def measure_landscapes(
    runs: Mapping[str, str | Path],
    out: str | Path | None = None,
    options: LandscapeOptions | None = None,
    *,
    source: Source | None = None,
    mesh: Mesh | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """The losses around what runs have trained, with numbers that say how flat they are.

    Args:
      runs: Directories of runs by the names that they are called.
      out: A folder in which finished points are kept, and `landscape.json` at the end.
      options: How to measure.
      source: Samples instead of those of the first run.
      mesh: The devices; default: the first one alone.
      allow_pickle: Whether `*.bin` files of the base parts may be read.

    Returns:
      What `landscape.json` has: how it was measured, `notes`, and in `models` for each of them its
      `centre`, the number of `trained` parameters and of those that `move`, `notes`, `pairs` (the
      numbers of `flatness`, the 2 x 2 `curvature` and the `losses` of each pair), and `mean`, for
      every number its mean over pairs and 95% interval; the curvature there is the mean of both
      directions.

    Raises:
      UserError: A folder is no run or cannot be read, or `out` holds points of other samples.
    """
    options = options or LandscapeOptions()
    configs = {name: _config(folder) for name, folder in runs.items()}
    samples = _Samples.of(configs, options, source)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    store = PointStore(out, samples.facts)
    models = {}
    for name, folder in runs.items():
        found = _measure(folder, configs[name], samples, store, mesh, allow_pickle)
        models[name] = {"run": str(folder), "tuning": configs[name].tuning, **found}
    few = [f"fewer than {MIN_PAIRS} pairs of directions are no evidence of a difference"]
    result = {
        "version": __version__,
        **store.facts,
        "axis": options.axis.tolist(),
        "notes": samples.notes + (few if options.pairs < MIN_PAIRS else []),
        "models": models,
    }
    store.finish(result)
    return result


def _config(folder: str | Path) -> RunConfig:
    if not is_workdir(Path(folder)):
        raise UserError(
            f"{folder} is no run's directory, which would say what trains and on which samples"
        )
    return read_config(Path(folder) / "config.json")


@dataclasses.dataclass(frozen=True)
class _Samples:
    """The samples of all models.

    Attributes:
      source: The samples.
      options: How landscapes are measured.
      max_seq_len: Tokens per row, enough for every model.
      images_per_row: Images per row, likewise.
      facts: What the points of a landscape are, samples and options.
      notes: Sentences about the samples.
    """

    source: Subset
    options: LandscapeOptions
    max_seq_len: int
    images_per_row: int
    facts: dict[str, Any]
    notes: list[str]

    @classmethod
    def of(
        cls, configs: Mapping[str, RunConfig], options: LandscapeOptions, source: Source | None
    ) -> "_Samples":
        """The samples of the first run, or of a source."""
        (first, config), *others = configs.items()
        split, notes = "own", []
        if source is None:
            split, source = _samples_of(first, config, options.split)
            if split == "training":
                notes.append(f"the samples are of the training data of {first}")
        for name, other in others:
            if other.objective != config.objective:
                raise UserError(
                    f"{first} was trained for {config.objective}, {name} for {other.objective}; "
                    "their losses cannot be compared"
                )
            if split != "own" and _data_of(other) != _data_of(config):
                notes.append(f"{name} has other data than {first}, whose samples these are")
        count = min(options.samples, len(source))
        rng = np.random.default_rng(options.seed)
        subset = Subset(source, np.sort(rng.choice(len(source), count, replace=False)))
        ids = [str(getattr(subset[n], "id", subset.indices[n])) for n in range(count)]
        kept = ("points", "span", "pairs", "normalize", "seed", "chunk")
        facts = {name: getattr(options, name) for name in kept}
        facts |= {"objective": config.objective, "split": split, "n": count}
        return cls(
            subset,
            options,
            max(one.max_seq_len for one in configs.values()),
            max(one.images_per_row for one in configs.values()),
            facts | {"data": short_hash(json.dumps(ids))},
            notes,
        )


def _data_of(config: RunConfig) -> tuple:
    held = config.validation
    return dict(config.data), held.share, dict(held.data), config.seed if held.share else None


def _samples_of(name: str, config: RunConfig, split: str) -> tuple[str, Source]:
    """The samples of a split of a run, or of the first one that it has."""
    training, held_out = build_sources(config)
    split = split or ("training" if held_out is None else "validation")
    if split == "training":
        return split, training
    if held_out is None:
        raise UserError(f"run {name} has no validation data; give --split training")
    return split, held_out


def _measure(
    folder: str | Path,
    config: RunConfig,
    samples: _Samples,
    store: PointStore,
    mesh: Mesh,
    allow_pickle: bool,
) -> dict[str, Any]:
    """The landscape of a run, as `measure_landscapes` describes it."""
    options = samples.options
    mllm, processor = load_workdir(folder, allow_pickle=allow_pickle, mesh=mesh)
    if processor is None:
        raise UserError(f"{folder} has no tokenizer, so it reads no samples")
    model = fingerprint(mllm)
    key = f"{model}-{exact_fingerprint(mllm)}"
    graphdef, trainable, frozen = split_model(mllm, config.also_train)
    trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)
    loss = RunLoss(graphdef, get_objective(config.objective), mesh)
    batches = all_batches(
        samples.source,
        processor,
        config,
        mesh,
        batch_size=options.batch_size,
        max_seq_len=samples.max_seq_len,
        images_per_row=samples.images_per_row,
    )
    data = loss.data(trainable, frozen, batches)
    pairs, moved = [], 0
    for pair in range(options.pairs):
        drawn = draw_directions(
            trainable, options.seed, pair, normalize=options.normalize, tuning=mllm.tuning
        )
        moved = sum(int((x != 0).sum()) for x in jax.tree.leaves(drawn[0]))
        known, chunks = store.chunks(key, pair), {}
        for first, losses in losses_on_plane(
            loss, trainable, data, drawn, options.axis, chunk=options.chunk, known=known
        ):
            chunks[first] = losses
            if first not in known:
                store.add(key, pair, first, losses)
        bend = store.curvature(key, pair)
        if bend is None:
            bend = sum(curvature(loss, trainable, part, drawn) for part in data.parts)
            store.add(key, pair, CURVATURE, bend := np.asarray(bend).tolist())
        grid = join_chunks(chunks, options.points)
        pairs.append(flatness(grid, options.axis) | {"curvature": bend, "losses": _listed(grid)})
    reset = options.normalize == "none" and is_scale_invariant(mllm.tuning)
    return {
        "model": model,
        "processor": processor_facts(processor)["hash"],
        "centre": pairs[0]["centre"],
        "trained": sum(x.size for x in jax.tree.leaves(trainable)),
        "move": moved,
        "notes": [NO_LENGTH] if reset else [],
        "mean": {name: _mean(name, pairs) for name in MEASURES},
        "pairs": pairs,
    }


def _listed(grid: Float[np.ndarray, "P P"]) -> list[list[float | None]]:
    """The losses as JSON has them, which knows no NaN."""
    return [[x if np.isfinite(x) else None for x in row] for row in grid.tolist()]


def _mean(name: str, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over pairs and its interval; None where a pair has no such number."""
    values = [pair[name] for pair in pairs]
    if name == "curvature":
        values = [float(np.trace(bend)) / 2 for bend in values]
    if any(value is None or not np.isfinite(value) for value in values):
        return {"mean": None, "interval95": None}
    mean, bounds = mean_with_interval(values, share=name.startswith("share"))
    return {"mean": mean, "interval95": bounds}
