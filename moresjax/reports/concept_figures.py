"""Figures of concepts: their words beside the samples that activate them most, and their shift."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from moresjax.reports.plots import plt, styles

THUMBNAIL = 160  # pixels of the longer side of an image on a sheet
LINE = 22  # letters of a line of words
# What is drawn for a control, and how.
DRAWN = {"own": "-", "global": "--", "shuffled": ":", "original": "-."}

# The picture of an image that states name; None where there is none.
Pictures = Callable[[str], UInt8[np.ndarray, "Y X 3"] | None]


def file_pictures(root: str | Path = "") -> Pictures:
    """Pictures of images that are files, below `root`."""

    def open_file(name: str) -> UInt8[np.ndarray, "Y X 3"] | None:
        path = Path(root) / name
        if not path.is_file():
            return None
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                return np.asarray(small)
        except OSError:
            return None

    return open_file


def contact_sheet(
    words: Sequence[Sequence[str]],
    images: Sequence[Sequence[Sequence[str]]],
    pictures: Pictures,
    captions: Sequence[str] = (),
    under: Sequence[Sequence[str]] = (),
) -> Figure:
    """A row for every concept: its words, and its most activating samples (figures 3 and 4).

    Args:
      words: The words of each concept.
      images: For each concept and sample the names of its images, of which the first is shown.
      pictures: Gives the picture of a name.
      captions: A line above the words of each concept.
      under: For each concept and sample a line below its picture, such as its answer.
    """
    columns = max((len(own) for own in images), default=0)
    size = (2.6 + 1.25 * columns, 0.4 + 1.45 * len(images))
    ratios = [2.1, *[1.0] * columns]
    figure, axes = plt.subplots(
        len(images), columns + 1, figsize=size, squeeze=False, width_ratios=ratios
    )
    for k, row in enumerate(axes):
        for axis in row:
            axis.axis("off")
        caption = captions[k] if captions else f"concept {k}"
        own = words[k] if k < len(words) else ()
        row[0].text(0, 1, caption, fontsize=8, weight="bold", va="top")
        row[0].text(0, 0.84, _lines(own), fontsize=7, va="top", linespacing=1.35)
        for n, names in enumerate(images[k]):
            picture = pictures(names[0]) if names else None
            if picture is not None:
                row[n + 1].imshow(picture)
            line = under[k][n] if under else ""
            row[n + 1].set_title(line[:18], fontsize=7, pad=2)
    figure.tight_layout(pad=0.4)
    return figure


def _lines(words: Sequence[str]) -> str:
    """Words in lines of a limited length."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > LINE:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return "\n".join(lines)


def recovery_figure(tuned: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Recovery against alpha, a column for each tuned model, a row for each measure.

    Args:
      tuned: For each tuned model its entry of `shift.json`.
    """
    measures = {"cosine": "cosine with match", "t_overlap": "T-Overlap, %", "keywords": "keywords"}
    entries = [entry["recovery"]["own"][0] for entry in tuned.values()]
    rows = [name for name in measures if any(entry.get(name) is not None for entry in entries)]
    size = (3.3 * len(tuned) + 0.6, 2.3 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(tuned), figsize=size, squeeze=False)
    colours = styles(DRAWN)
    for column, (title, entry) in enumerate(tuned.items()):
        for axis, measure in zip(axes[:, column], rows, strict=True):
            for name, points in entry["recovery"].items():
                x = [point["alpha"] for point in points]
                values = [point.get(measure) for point in points]
                y = [np.nan if value is None else value for value in values]
                style = {"color": colours[name].colour, "linestyle": DRAWN[name]}
                axis.plot(x, y, label=name, marker=colours[name].marker, markersize=3, **style)
            axis.set_xlabel("alpha", fontsize=8)
            if column == 0:
                axis.set_ylabel(measures[measure], fontsize=8)
            _plain(axis)
        axes[0, column].set_title(title, fontsize=9)
    return _with_legend(figure, axes[0, 0])


def concepts_figure(tuned: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Each concept before and after its shift, beside its match in the tuned model (figure 5)."""
    first = next(iter(tuned.values()))["concepts"]
    words = any(row["t_overlap"] is not None for row in first)
    key, label = ("t_overlap", "T-Overlap, %") if words else ("cosine", "cosine with match")
    size = (0.9 + 0.34 * len(first), 2.0 * len(tuned) + 0.5)
    figure, axes = plt.subplots(len(tuned), 1, figsize=(max(size[0], 4), size[1]), squeeze=False)
    colours = styles(DRAWN)
    for axis, (title, entry) in zip(axes[:, 0], tuned.items(), strict=True):
        rows = [row[key] or {} for row in entry["concepts"]]
        for place, name in ((-0.2, "original"), (0.2, "own")):
            heights = [row.get(name) or 0 for row in rows]
            x = np.arange(len(rows)) + place
            axis.bar(x, heights, 0.38, color=colours[name].colour, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(label, fontsize=8)
        axis.set_xticks(range(len(rows)))
        _plain(axis)
    axes[-1, 0].set_xlabel("concept", fontsize=8)
    return _with_legend(figure, axes[0, 0])


def correlation_figure(
    tuned: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Figure:
    """Consistency and magnitude of shifts against recovery and each other (figures 9, 19, 21)."""
    axes_of = {
        "consistency": ("cosine_with_mean", "relative_gain", "consistency", "relative gain"),
        "magnitude": ("magnitude", "relative_gain", "norm of the shift", "relative gain"),
        "consistency_magnitude": (
            "magnitude",
            "cosine_with_mean",
            "norm of the shift",
            "consistency",
        ),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.2))
    colours = styles(tuned)
    for axis, (name, (x, y, xlabel, ylabel)) in zip(axes, axes_of.items(), strict=True):
        for title, entry in tuned.items():
            rows = [row for row in entry["concepts"] if None not in (row[x], row[y])]
            style = colours[title]
            points = [row[x] for row in rows], [row[y] for row in rows]
            axis.scatter(*points, s=16, color=style.colour, marker=style.marker, label=title)
        overall = found[name]["overall"]
        r = "-" if overall["r"] is None else f"{overall['r']:.2f} (p {overall['p']:.2g})"
        axis.set_title(f"r = {r}, n = {overall['n']}", fontsize=8)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.set_ylabel(ylabel, fontsize=8)
        _plain(axis)
    return _with_legend(figure, axes[0])


def sweep_figure(
    sweep: Mapping[str, Sequence[Mapping[str, Any]]], xlabel: str, measure: str, label: str
) -> Figure:
    """A measure against the number of concepts, the layer or the step (figures 14, 17, 18).

    Args:
      sweep: For each line its points: `x`, and the measure of `original`, `own`, `global` and
        `shuffled`.
      xlabel: The label of the horizontal axis.
      measure: The measure.
      label: Its name.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.2))
    colours = styles(sweep)
    for title, points in sweep.items():
        for name, dash in DRAWN.items():
            kept = [point for point in points if point[measure].get(name) is not None]
            if not kept:
                continue
            x, y = [point["x"] for point in kept], [point[measure][name] for point in kept]
            options: dict[str, Any] = {"linestyle": dash, "marker": colours[title].marker}
            label_of = f"{title}, {name}" if len(sweep) > 1 else name
            colour = colours[title].colour
            axis.plot(x, y, markersize=3, color=colour, label=label_of, **options)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    _plain(axis)
    return _with_legend(figure, axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)


def _with_legend(figure: Figure, axis: Axes) -> Figure:
    """The legend of one of the axes below all of them."""
    handles, names = axis.get_legend_handles_labels()
    rows = -(-len(names) // 4)
    height = figure.get_figheight() + 0.25 * rows
    figure.set_figheight(height)
    figure.tight_layout(rect=(0, 0.25 * rows / height, 1, 1))
    figure.legend(handles, names, ncol=4, fontsize=7, frameon=False, loc="lower center")
    return figure
