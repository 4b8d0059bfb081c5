"""Figures and pages about steering: strengths, counts, probes, answers on their images."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moresjax.analysis.separability import Separability
from moresjax.evaluation.steering.ask import Trial
from moresjax.evaluation.steering.run import BASELINE, SteeringResult
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.model import Model
from moresjax.reports.html import image_uri, render
from moresjax.reports.plots import evenly, lines, save, styles
from moresjax.reports.prompt_figures import pictures

SHOWN = 24  # questions on a page
DRAW = re.compile(r"n(\d+)\.\d+")  # the names of vectors of few states
PANELS = 12  # planes of a figure


def strength_figure(rows: Sequence[Mapping[str, Any]], value: str) -> Figure:
    """A number of every vector against its strength.

    Args:
      rows: Rows of vectors, of one task; those of few states are left out.
      value: The name of the number, such as `success` or `kept`.
    """
    series: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    kept = [row for row in rows if row.get(value) is not None and not DRAW.fullmatch(row["vector"])]
    several = len({row["positions"] for row in kept}) > 1
    for row in sorted(kept, key=lambda row: row["alpha"]):
        name = f"{row['vector']}, {row['positions']}" if several else row["vector"]
        series[name][0].append(row["alpha"])
        series[name][1].append(row[value])
    return lines(dict(series), ("alpha", value.replace("_", " ")), title="")


def layer_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The shares of successes and of other answers kept against the layer that is steered.

    Args:
      rows: Rows of vectors, of one task; a vector of several layers is called `NAME@LAYER`.

    Returns:
      None where no vector has several layers.
    """
    own = [row for row in rows if row["vector"].endswith(f"@{row['layer']}")]
    if len({row["layer"] for row in own}) < 2:
        return None
    several = {name: len({row[name] for row in own}) > 1 for name in ("alpha", "positions")}
    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in sorted(own, key=lambda row: (row["alpha"], row["layer"])):
        how = f", alpha {row['alpha']:g}" * several["alpha"]
        how += f", {row['positions']}" * several["positions"]
        for value in ("success", "kept"):
            if row[value] is not None:
                series[f"{value}{how}"][0].append(row["layer"])
                series[f"{value}{how}"][1].append(row[value])
    return lines(dict(series), ("layer", "share of answers"), title="")


def change_figure(row: Mapping[str, Any]) -> Figure:
    """How much more often the answers are given that a vector changes most."""
    changes = row["selection"]["changes"]
    main = {*row["selection"]["targets"]}
    figure, axis = plt.subplots(figsize=(5.2, 0.6 + 0.35 * max(len(changes), 1)))
    names = [*changes][::-1]
    colours = ["#0072B2" if name in main else "#BBBBBB" for name in names]
    axis.barh(names, [changes[name] for name in names], color=colours)
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_xlabel("answers more than without steering")
    axis.set_title(f"{row['vector']}, alpha {row['alpha']:g}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def size_figure(
    cosines: Mapping[int, Sequence[float]], rows: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Vectors of few states against the number of states: a point for every draw, and their mean.

    Args:
      cosines: By number of states, the cosines of the draws with the vector of all.
      rows: Rows of vectors, of one task, for a second panel with the success of every draw.
    """
    successes: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if (draw := DRAW.fullmatch(row["vector"])) and row["success"] is not None:
            successes[int(draw[1])].append(row["success"])
    panels: dict[str, Mapping[int, Sequence[float]]] = {"cosine with the vector of all": cosines}
    if successes:
        panels["success"] = successes
    shape = (4.2 * len(panels), 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=shape, squeeze=False)
    for axis, (label, found) in zip(axes.flat, panels.items(), strict=True):
        sizes = sorted(found)
        draws = [(size, value) for size in sizes for value in found[size]]
        axis.plot(*zip(*draws, strict=True), "o", color="#BBBBBB", markersize=4, label="draws")
        means = [float(np.mean(found[size])) for size in sizes]
        axis.plot(sizes, means, "o-", color="#0072B2", markersize=4, label="mean of draws")
        axis.set_xlabel("states of each side")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def probe_figure(layers: Sequence[Separability]) -> Figure:
    """The accuracy of linear probes by layer, beside always guessing the most frequent class."""
    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for layer in layers:
        for name, value in (("probe", layer.test), ("most frequent class", layer.majority)):
            series[f"{layer.site}: {name}"][0].append(layer.layer)
            series[f"{layer.site}: {name}"][1].append(value)
    return lines(dict(series), ("layer", "accuracy on test states"), title="")


def plane_figure(layers: Sequence[Separability], labels: Sequence[str]) -> Figure:
    """The states of some layers on their two first principal components, coloured by class."""
    chosen = [layers[place] for place in evenly(len(layers), PANELS)]
    columns = min(4, len(chosen))
    count = -(-len(chosen) // columns)
    shape = (2.4 * columns, 2.4 * count)
    figure, axes = plt.subplots(count, columns, figsize=shape, squeeze=False)
    drawn, classes = styles(sorted({*labels})), np.asarray(labels)
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    for axis, layer in zip(axes.flat, chosen, strict=False):
        for name, style in drawn.items():
            points = layer.plane[classes == name]
            axis.scatter(*points.T, s=6, alpha=0.6, color=style.colour, label=name)
        axis.set_title(f"{layer.site} {layer.layer}: {layer.test:.2f}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    options = {"fontsize": 7, "frameon": False, "loc": "lower center"}
    figure.legend(handles, names, ncol=min(len(names), 6), **options)
    return figure


def steering_report(
    model: Model,
    tasks: Sequence[BenchmarkTask],
    trials: Sequence[Trial],
    result: SteeringResult,
    out: str | Path,
    cosines: Mapping[int, Sequence[float]] | None = None,
) -> list[Path]:
    """Figures over all questions of a steering run, and a page of answers on their images per task.

    Args:
      model: The model, which shows images as it is given them.
      tasks: The questions.
      trials: The trials; the page shows the largest strength of the first one's vector.
      result: What they did.
      out: The directory.
      cosines: Cosines of vectors of few states with that of all.

    Returns:
      The files.
    """
    out = Path(out)
    rows = [row for row in result.overall if row["vector"] != BASELINE]
    name = trials[0].name
    strongest = max((t for t in trials if t.name == name), key=lambda trial: trial.alpha)
    shown = next(r for r in rows if (r["vector"], r["alpha"]) == (name, strongest.alpha))
    figures = {"changes": change_figure(shown)}
    for value in ("success", "kept"):
        if any(row[value] is not None for row in rows):
            figures[value] = strength_figure(rows, value)
    if figure := layer_figure(rows):
        figures["layers"] = figure
    if cosines:
        figures["sizes"] = size_figure(cosines, rows)
    for file, figure in figures.items():
        save(figure, out / f"{file}.png", dpi=150)
    pages = [_page(model, task, strongest, result, out / f"{task.name}.html") for task in tasks]
    return [*(out / f"{file}.png" for file in figures), *pages]


def _page(
    model: Model, task: BenchmarkTask, trial: Trial, result: SteeringResult, path: Path
) -> Path:
    """Questions whose answer a trial changes, with both answers."""
    answers = result.answers[task.name]
    pairs = zip(task.examples, answers[BASELINE], answers[trial.key], strict=True)
    changed = [own for own in pairs if own[1] != own[2]]
    shown = []
    for example, before, after in changed[:SHOWN]:
        images = pictures(model, example.images)
        one = {
            "question": example.prompt.replace("<image>", "").strip(),
            "before": before,
            "after": after,
            "answer": example.answer,
            "images": [image_uri(image) for image in images],
        }
        shown.append(one)
    values = {"trial": trial, "shown": shown, "changed": len(changed), "n": len(task.examples)}
    return render("steering.html.j2", path, task=task.name, **values)
