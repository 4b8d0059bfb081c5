"""The loss landscape of MRT's figure 5 on the digits world."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.data.digits import DigitsSource
from moresjax.evaluation.landscape.run import LandscapeOptions, measure_landscapes
from moresjax.reports.landscape import contours
from moresjax.studies.findings import compare_with
from moresjax.studies.pipeline import Finetuning, Pipeline
from moresjax.studies.study import Outcome, Study, agreement, claim, values_table

MRT = "mrt"
OPTIONS = LandscapeOptions(points=11, pairs=3, samples=16, batch_size=16)
FAST = LandscapeOptions(points=3, pairs=2, samples=4, batch_size=4)
# What the paper's figure shows of how far the lowest region reaches; only the order counts.
PAPER = {MRT: 1, "m2pt": 0, "mixlora": 0}
# The vocabulary head, which trains with M2PT, has the rate that `full` has here.
HEAD = f"connector={recipe.CONNECTOR_LR};llm.head={recipe.LEARNING_RATES['full']}"
RUNS = (
    Finetuning(MRT, "mrt:init=identity"),
    Finetuning("lora r=8", recipe.METHODS["lora r=8"]),
    Finetuning("m2pt", "m2pt", {"optimizer.lr_by_component": HEAD}),
    Finetuning("mixlora", "mixlora"),
)


def _landscape(pipeline: Pipeline, study: Study) -> Outcome:
    options = FAST if pipeline.fast else OPTIONS
    found: dict[str, dict[str, list[float]]] = {}
    results = []
    for seed in pipeline.seeds:
        runs = {run.name: pipeline.folder(seed, run.name) for run in study.runs}
        source = DigitsSource("instruct", split=pipeline.split, seed=seed)
        out = pipeline.out / f"seed{seed}" / "landscape"
        results.append(measure_landscapes(runs, out, options, source=source))
        for name, entry in results[-1]["models"].items():
            for measure, value in _numbers(entry).items():
                found.setdefault(measure, {}).setdefault(name, []).append(value)
    shares = {
        "at most twice the centre": found["share_twice"],
        "at most .1 above the centre": found["share_above"],
    }
    others = {
        "loss at the centre": found["centre"],
        "maximum within .25, above the centre": found["rise"],
        "curvature": found["curvature"],
    }
    what = "Share of the grid at most twice the centre's loss"
    sentences = [
        agreement(what, MRT, PAPER, found["share_twice"]),
        compare_with(MRT, what, found["share_twice"]),
        compare_with(MRT, "Share at most .1 above the centre", found["share_above"]),
        compare_with(MRT, "Curvature d'Hd, in hundredths,", found["curvature"]),
    ]
    tables = [
        values_table("Shares of the grid", shares, MRT),
        values_table("Losses and curvature (differences in hundredths)", others, MRT),
    ]
    figures = {f"loss landscapes of seed {pipeline.seeds[0]}": contours(results[0])}
    return Outcome(tables, sentences, found, figures)


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """A model's numbers of one seed, means over pairs of directions."""
    means = {name: own["mean"] for name, own in entry["mean"].items()}
    known = {name: float("nan") if x is None else float(x) for name, x in means.items()}
    return known | {"rise": float(np.subtract(known["maximum_near"], known["centre"]))}


STUDIES = (
    Study(
        "mrt-landscape",
        "A Representation View, Figure 5: the loss around what MRT and its baselines train",
        RUNS,
        claim(
            "The low region around MRT's minimum is larger than around M2PT's and MixLoRA's, and "
            "its edge is smoother."
        ),
        "Filter-normalised directions (the paper does not say how it scaled its own), held-out "
        "handwriting; the connector trains with every method, and learning rates of MRT, M2PT and "
        "MixLoRA were not searched for.",
        _landscape,
        more_minutes=1.0,
    ),
)
